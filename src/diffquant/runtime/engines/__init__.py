"""Engines: programs that draw pictures from a file, so that it is proved in the one that loads it.

One row per engine; its module is imported when it is asked for, and the program it drives only
then: diffquant itself never needs one.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.runtime.engines.base import EngineFiles, Side

__all__ = ["ENGINES", "EngineFiles", "EngineRow", "Side", "open_side"]


@dataclass(frozen=True, slots=True)
class EngineRow:
    """An engine.

    Attributes:
        module: that has `open_side(files) -> Side`.
        package: it needs, "" if none.
        install: what to type where it is missing.
    """

    module: str
    package: str = ""
    install: str = ""


_HERE = "diffquant.runtime.engines"
ENGINES: Mapping[str, EngineRow] = {
    "bundled": EngineRow(f"{_HERE}.bundled"),
    "diffusers": EngineRow(f"{_HERE}.diffusers", "diffusers", "pip install 'diffquant[diffusers]'"),
    "sdcpp": EngineRow(f"{_HERE}.sdcpp", "cyllama", "pip install 'diffquant[clients]'"),
}


def open_side(engine: str, files: EngineFiles) -> Side:
    """Open a model in an engine.

    Raises:
        UnknownFormat: no such engine.
        UsageError: its program is not installed, or a file it cannot be given.
    """
    if engine not in ENGINES:
        raise UnknownFormat(engine, ENGINES, what="engine")
    row = ENGINES[engine]
    if row.package and importlib.util.find_spec(row.package) is None:
        raise UsageError(f"--engine {engine} needs {row.package}, not installed: {row.install}")
    module = importlib.import_module(row.module)
    return cast("Side", module.open_side(files))
