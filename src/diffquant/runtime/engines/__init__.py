"""Engines: programs that draw pictures from a file, so that it is proved in the one that loads it.

One row per engine; its module is imported when it is asked for, and the program it drives only
then: diffquant itself never needs one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.runtime.engines.base import EngineFiles, Side

__all__ = ["ENGINES", "EngineFiles", "EngineRow", "Side", "open_rough", "open_side"]


@dataclass(frozen=True, slots=True)
class EngineRow:
    """An engine.

    Attributes:
        module: that has `open_side(files) -> Side`.
        package: it needs, "" if none.
        install: what to type where it is missing.
        opens_rough: whether it honours `EngineFiles.rough`.
    """

    module: str
    package: str = ""
    install: str = ""
    opens_rough: bool = False


_HERE = "diffquant.runtime.engines"
ENGINES: Mapping[str, EngineRow] = {
    "bundled": EngineRow(f"{_HERE}.bundled", opens_rough=True),
    "diffusers": EngineRow(f"{_HERE}.diffusers", "diffusers", "pip install 'diffquant[diffusers]'"),
    "sdcpp": EngineRow(f"{_HERE}.sdcpp", "cyllama", "pip install 'diffquant[clients]'"),
}


@contextlib.contextmanager
def open_rough(engine: str, files: EngineFiles) -> Iterator[Side | None]:
    """Open a model with its denoiser in bfloat16, once; None where the engine cannot."""
    if ENGINES[engine].opens_rough:
        yield open_side(engine, replace(files, rough=True))
        return
    with open_side(engine, files).rough() as side:
        yield side


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
