"""What a [[model]] table may say: a row per key, its kind as data, and the frozen result.

    [defaults]            any row that `shared` marks; a [[model]] overrides it key by key
    [[model]]             source, and any other row

Values are checked when they are read: an option that `quantize` would refuse is refused here, with
the table it stands in. Paths are relative to the plan file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.convert.lora.merge import LoraInput
from diffquant.convert.request import POLICIES, ROUNDINGS
from diffquant.convert.targets import TARGETS
from diffquant.convert.user_rules import user_rules
from diffquant.publish.batch.values import (
    Read,
    UnknownNameError,
    choice,
    file_path,
    flag,
    known,
    many,
    plain_name,
    text,
)
from diffquant.publish.batch.wants import Want, read_want, want_of
from diffquant.quant.type_sets import types_of_set

__all__ = ["KEYS", "VERIFY", "Key", "Settings"]

VERIFY = ("none", "load", "tensors", "image")
_CONTAINERS = ("gguf", "safetensors", "folder")
_REMOTE = re.compile(r"[a-z]{2,8}://")


@dataclass(frozen=True, slots=True)
class Settings:
    """One [[model]] with the defaults filled in; see `diffquant quantize --help` for most of it.

    Attributes:
        source: a path, or a remote name as it was written.
        name: what outputs' names begin with.
        types: what to make of it, in the order given.
        targets: for which programs; () is the container's own default.
        container: "" for each type's first.
        verify: one of VERIFY.
        prompts: a file, for "image".
    """

    source: Path | str
    name: str
    types: tuple[Want, ...]
    targets: tuple[str, ...] = ()
    container: str = ""
    policy: str = POLICIES[0]
    imatrix: tuple[Path, ...] = ()
    rounding: str = ROUNDINGS[0]
    inputs: Path | None = None
    bias_correction: bool = False
    lora: tuple[LoraInput, ...] = ()
    allow_missing: bool = False
    base: Path | None = None
    parts: tuple[str, ...] = ()
    all_parts: bool = False
    tensor_types: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    pure: bool = False
    allow_requantize: bool = False
    arch: str = ""
    verify: str = "tensors"
    prompts: Path | None = None

    @property
    def reads(self) -> tuple[Path, ...]:
        """Every file and folder on this machine that is read."""
        given = (self.source, self.base, self.inputs, self.prompts, *self.imatrix)
        wanted = (path for one in self.types for path in one.reads)
        paths = (*given, *(one.path for one in self.lora), *wanted)
        return tuple(one for one in paths if isinstance(one, Path))


@dataclass(frozen=True, slots=True)
class Key:
    """One row: a key of a table.

    Attributes:
        name: as it is written.
        read: checks a value and returns what Settings has; raises ValueError with what is expected,
            UnknownNameError for names that no table has.
        field: of Settings; several keys may add to one.
        shared: whether [defaults] may have it.
    """

    name: str
    read: Read
    field: str = ""
    shared: bool = True

    @property
    def into(self) -> str:
        """The field of Settings."""
        return self.field or self.name


def _source(value: Any, folder: Path) -> Path | str:  # noqa: ANN401
    given = text(value, folder)
    return given if _REMOTE.match(given) else file_path(given, folder)


def _set(value: Any, folder: Path) -> tuple[Want, ...]:  # noqa: ANN401
    kinds = known(lambda: types_of_set(text(value, folder)))
    return tuple(want_of(kind.name) for kind in kinds)


def _tensor_types(value: Any, folder: Path) -> tuple[str, ...]:  # noqa: ANN401
    found: tuple[str, ...] = many(text)(value, folder)
    known(lambda: user_rules(found, ()))
    return found


def _exclude(value: Any, folder: Path) -> tuple[str, ...]:  # noqa: ANN401
    found: tuple[str, ...] = many(text)(value, folder)
    known(lambda: user_rules((), found))
    return found


def _number(value: Any) -> float:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
        raise ValueError("a number for `weight` and `te_scale`")
    return float(value)


def _lora(value: Any, folder: Path) -> LoraInput:  # noqa: ANN401
    what = 'a table such as { file = "style.safetensors", weight = 0.8, te_scale = 1.0 }'
    if not isinstance(value, dict) or not {"file"} <= value.keys() <= {
        "file",
        "weight",
        "te_scale",
    }:
        raise ValueError(what)
    weight, scale = _number(value.get("weight", 1.0)), _number(value.get("te_scale", 1.0))
    if not math.isfinite(weight * scale):
        raise ValueError(what)
    return LoraInput(file_path(value["file"], folder), weight, weight * scale)


_ROWS = (
    Key("source", _source, shared=False),
    Key("name", plain_name, shared=False),
    Key("types", many(read_want)),
    Key("set", _set, field="types"),
    Key("target", choice(tuple(TARGETS), UnknownNameError), field="targets"),
    Key("targets", many(choice(tuple(TARGETS), UnknownNameError))),
    Key("container", choice(_CONTAINERS)),
    Key("policy", choice(POLICIES)),
    Key("imatrix", many(file_path)),
    Key("rounding", choice(ROUNDINGS)),
    Key("inputs", file_path),
    Key("bias_correction", flag),
    Key("lora", many(_lora)),
    Key("allow_missing", flag),
    Key("base", file_path),
    Key("parts", many(text)),
    Key("all_parts", flag),
    Key("tensor_types", _tensor_types),
    Key("exclude", _exclude),
    Key("pure", flag),
    Key("allow_requantize", flag),
    Key("arch", text),
    Key("verify", choice(VERIFY)),
    Key("prompts", file_path),
)
KEYS: Mapping[str, Key] = {row.name: row for row in _ROWS}
