"""What a [[model]] table may say: a row per key, its kind as data, and the frozen result.

    [defaults]            any row that `shared` marks; a [[model]] overrides it key by key
    [[model]]             source, and any other row

Values are checked when they are read: an option that `quantize` would refuse is refused here, with
the table it stands in. Paths are relative to the plan file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.convert.lora.merge import LoraInput
from diffquant.convert.request import POLICIES, ROUNDINGS
from diffquant.convert.targets import TARGETS
from diffquant.convert.user_rules import user_rules
from diffquant.core.errors import DiffquantError, closest
from diffquant.quant.type_sets import types_of_set
from diffquant.quant.types import type_named

__all__ = ["KEYS", "VERIFY", "Key", "Settings"]

VERIFY = ("none", "load", "tensors", "image")
_CONTAINERS = ("gguf", "safetensors", "folder")
_REMOTE = re.compile(r"[a-z]{2,8}://")
# What Windows cannot have in a name; a plan is to mean the same everywhere.
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\<>:\"|?*]{1,120}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_MAX_TEXT = 4096

Read = Callable[[Any, Path], Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """One [[model]] with the defaults filled in; see `diffquant quantize --help` for most of it.

    Attributes:
        source: a path, or a remote name as it was written.
        name: what outputs' names begin with.
        types: canonical names, in the order given.
        targets: for which programs; () is the container's own default.
        container: "" for each type's first.
        verify: one of VERIFY.
        prompts: a file, for "image".
    """

    source: Path | str
    name: str
    types: tuple[str, ...]
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
        paths = (*given, *(one.path for one in self.lora))
        return tuple(one for one in paths if isinstance(one, Path))


@dataclass(frozen=True, slots=True)
class Key:
    """One row: a key of a table.

    Attributes:
        name: as it is written.
        read: checks a value and returns what Settings has; raises ValueError with what is expected.
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


def _text(value: Any, _: Path) -> str:  # noqa: ANN401 - any TOML value
    if not isinstance(value, str) or not value or len(value) > _MAX_TEXT or "\0" in value:
        raise ValueError(f"a text of 1 to {_MAX_TEXT} characters")
    return value


def _flag(value: Any, _: Path) -> bool:  # noqa: ANN401
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _path(value: Any, folder: Path) -> Path:  # noqa: ANN401
    path = folder / _text(value, folder)
    if not path.exists():
        raise ValueError(f"a file that exists; there is no {path}")
    return path


def _source(value: Any, folder: Path) -> Path | str:  # noqa: ANN401
    text = _text(value, folder)
    return text if _REMOTE.match(text) else _path(text, folder)


def _name(value: Any, folder: Path) -> str:  # noqa: ANN401
    text = _text(value, folder)
    if not _NAME.fullmatch(text) or text[0] == "." or text[-1] in ". " or _DEVICES.fullmatch(text):
        raise ValueError("a file name without its extension, and no folder in it")
    return text


def _choice(names: tuple[str, ...]) -> Read:
    def read(value: Any, folder: Path) -> str:  # noqa: ANN401
        if value not in names or not isinstance(value, str):
            near = closest(value, names) if isinstance(value, str) else None
            hint = f" (did you mean {near!r}?)" if near else ""
            raise ValueError(f"one of {', '.join(names)}{hint}")
        return value

    return read


def _many(read: Read) -> Read:
    """One value, or a list of them without doubles."""

    def each(value: Any, folder: Path) -> tuple[Any, ...]:  # noqa: ANN401
        values = value if isinstance(value, list) else [value]
        found = tuple(read(one, folder) for one in values)
        if not found:
            raise ValueError("at least one value")
        if len(set(found)) < len(found):
            twice = next(one for one in found if found.count(one) > 1)
            raise ValueError(f"each value once; {twice} comes twice")
        return found

    return each


def _type(value: Any, folder: Path) -> str:  # noqa: ANN401
    return str(_known(lambda: type_named(_text(value, folder)).name))


def _set(value: Any, folder: Path) -> tuple[str, ...]:  # noqa: ANN401
    kinds = _known(lambda: types_of_set(_text(value, folder)))
    return tuple(kind.name for kind in kinds)


def _known(read: Callable[[], Any]) -> Any:  # noqa: ANN401 - what `read` returns
    try:
        return read()
    except DiffquantError as error:
        raise ValueError(f"something known: {error}") from None


def _tensor_types(value: Any, folder: Path) -> tuple[str, ...]:  # noqa: ANN401
    found: tuple[str, ...] = _many(_text)(value, folder)
    _known(lambda: user_rules(found, ()))
    return found


def _exclude(value: Any, folder: Path) -> tuple[str, ...]:  # noqa: ANN401
    found: tuple[str, ...] = _many(_text)(value, folder)
    _known(lambda: user_rules((), found))
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
    return LoraInput(_path(value["file"], folder), weight, weight * scale)


_ROWS = (
    Key("source", _source, shared=False),
    Key("name", _name, shared=False),
    Key("types", _many(_type)),
    Key("set", _set, field="types"),
    Key("target", _choice(tuple(TARGETS)), field="targets"),
    Key("targets", _many(_choice(tuple(TARGETS)))),
    Key("container", _choice(_CONTAINERS)),
    Key("policy", _choice(POLICIES)),
    Key("imatrix", _many(_path)),
    Key("rounding", _choice(ROUNDINGS)),
    Key("inputs", _path),
    Key("bias_correction", _flag),
    Key("lora", _many(_lora)),
    Key("allow_missing", _flag),
    Key("base", _path),
    Key("parts", _many(_text)),
    Key("all_parts", _flag),
    Key("tensor_types", _tensor_types),
    Key("exclude", _exclude),
    Key("pure", _flag),
    Key("allow_requantize", _flag),
    Key("arch", _text),
    Key("verify", _choice(VERIFY)),
    Key("prompts", _path),
)
KEYS: Mapping[str, Key] = {row.name: row for row in _ROWS}
