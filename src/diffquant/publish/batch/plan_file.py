"""The plan file of a batch: TOML, read as hostile input, every problem told at once.

tomllib gives lines for what is not TOML at all. Beyond that a problem is told with its table, and
the line of its [[model]] header, found by counting headers.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.core.errors import MalformedFile, QuantError, UsageError, closest
from diffquant.publish.batch.settings import KEYS, Settings
from diffquant.publish.batch.values import UnknownNameError

__all__ = ["BatchFile", "Model", "UnknownInPlanError", "read_plan_file"]

_LIMIT = 1 << 18  # bytes; three hundred for a model make 800 models
# tomllib takes time with the square of a dotted key's parts: 20,000 of them take 20 s.
_MAX_DOTS = 256  # in a line, which a key cannot leave
_TOP = ("output", "defaults", "model")
_SHOWN = 64  # characters of a stranger's key
_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*model[ \t]*\]\]", re.MULTILINE)
# One makes a value of the other meaningless, so that a table's own replaces both defaults.
_EITHER = (("types", "set"), ("target", "targets"))


@dataclass(frozen=True, slots=True)
class Model:
    """A [[model]] table.

    Attributes:
        where: how messages call it: [[model]] 2 (line 9).
        settings: with the defaults filled in.
    """

    where: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class BatchFile:
    """A plan file as it was read.

    Attributes:
        path: of the file itself.
        output: the folder that outputs go to.
        models: in the order of the file.
    """

    path: Path
    output: Path
    models: tuple[Model, ...]


class UnknownInPlanError(QuantError):
    """A plan that names types, formats or programs no table has, and is in order else."""

    exit_code = 4


class _Problems:
    """What is wrong with a plan, told together."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.unknown = True  # whether all of them are

    def add(self, text: str, *, unknown: bool = False) -> None:
        self.texts.append(text)
        self.unknown = self.unknown and unknown

    def check(self, path: Path) -> None:
        if not self.texts:
            return
        count = "a problem" if len(self.texts) == 1 else f"{len(self.texts)} problems"
        error = UnknownInPlanError if self.unknown else UsageError
        raise error(f"{path}: {count}: {'; '.join(self.texts)}")


def read_plan_file(path: Path) -> BatchFile:
    """Read and check a plan file.

    Raises:
        MalformedFile: it cannot be read, or is no TOML.
        UsageError: what it says makes no sense; all of it is told.
        UnknownInPlanError: types, formats or programs that no table has are all that is wrong.
    """
    text, tables = _parse(path)
    problems = _Problems()
    for key in tables:
        if key not in _TOP:
            problems.add(f"unknown {_key(key, _TOP)}")
    output = tables.get("output")
    if not isinstance(output, str) or not output or "\0" in output:
        problems.add("`output`: expected the folder to write to, relative to this file")
    defaults, rows = tables.get("defaults", {}), tables.get("model", [])
    if not isinstance(defaults, dict):
        problems.add("`defaults`: expected a table, [defaults]")
        defaults = {}
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        problems.add("expected [[model]] tables, at least one")
        rows = []
    folder = path.parent
    shared = _values(defaults, "[defaults]", folder, problems, shared=True)
    places = _places(text, len(rows))
    models = []
    for where, row in zip(places, rows, strict=True):
        own = _values(row, where, folder, problems, shared=False)
        if "source" not in row:
            problems.add(f"{where}: `source` is missing")
        settings = _settings(shared, own, where, problems)
        if not any(name in table for table in (row, defaults) for name in ("types", "set")):
            problems.add(f"{where}: no `types` and no `set`, here or in [defaults]")
        if settings is not None:
            models.append(Model(where, settings))
    problems.check(path)
    return BatchFile(path, folder / str(output), tuple(models))


def _parse(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        if not path.is_file():
            raise MalformedFile("no such file, or not a regular one", path=path)
        with path.open("rb") as file:
            raw = file.read(_LIMIT + 1)
    except OSError as error:
        raise MalformedFile(f"cannot be read: {error.strerror}", path=path) from error
    if len(raw) > _LIMIT:
        raise MalformedFile(f"larger than {_LIMIT} bytes: no plan of a batch", path=path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFile(f"not UTF-8 at byte {error.start}", path=path) from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.count(".") > _MAX_DOTS:
            raise MalformedFile(f"more than {_MAX_DOTS} dots in line {number}", path=path)
    try:
        return text, tomllib.loads(text)
    except RecursionError:
        raise MalformedFile("nested too deep for a plan of a batch", path=path) from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise MalformedFile(f"not TOML: {error}", path=path) from None


def _places(text: str, count: int) -> list[str]:
    """What each [[model]] is called; with its line unless a text in the file looks like one."""
    lines = [text.count("\n", 0, found.start()) + 1 for found in _HEADER.finditer(text)]
    if len(lines) != count:
        return [f"[[model]] {index + 1}" for index in range(count)]
    return [f"[[model]] {index + 1} (line {line})" for index, line in enumerate(lines)]


def _key(name: str, known: tuple[str, ...]) -> str:
    near = closest(name[:_SHOWN], known)
    hint = f", did you mean {near!r}?" if near else ""
    return f"key {name[:_SHOWN]!r}{hint} (known: {', '.join(known)})"


def _values(
    table: Mapping[str, Any], where: str, folder: Path, problems: _Problems, *, shared: bool
) -> dict[str, Any]:
    """The values of a table by key; what is wrong with them is added to `problems`."""
    known = tuple(name for name, row in KEYS.items() if row.shared or not shared)
    found: dict[str, Any] = {}
    for name, value in table.items():
        if name not in known:
            problems.add(f"{where}: unknown {_key(name, known)}")
            continue
        try:
            found[name] = KEYS[name].read(value, folder)
        except UnknownNameError as error:
            problems.add(f"{where}: `{name}`: expected {error}", unknown=True)
        except (ValueError, OSError, RecursionError) as error:
            problems.add(f"{where}: `{name}`: expected {error}")
    if {"target", "targets"} <= found.keys():
        problems.add(f"{where}: give `target` or `targets`, not both")
    return found


def _settings(
    shared: Mapping[str, Any], own: Mapping[str, Any], where: str, problems: _Problems
) -> Settings | None:
    """The defaults and a table's own values together."""
    values = dict(shared)
    for pair in _EITHER:
        if any(name in own for name in pair):
            for name in pair:
                values.pop(name, None)
    values |= own
    fields: dict[str, Any] = {"types": ()}
    for name, value in values.items():
        into = KEYS[name].into
        if into in ("types", "targets") and not isinstance(value, tuple):
            value = (value,)
        fields[into] = (*fields["types"], *value) if into == "types" else value
    twice = [one for one in fields["types"] if fields["types"].count(one) > 1]
    if twice:
        problems.add(f"{where}: type {twice[0]} is in `types` and in `set`; give it once")
    budgets = [one.budget.text for one in fields["types"] if one.budget is not None]
    if budgets and fields.get("pure"):
        problems.add(f"{where}: `pure` and {budgets[0]} both choose formats")
    if "prompts" in own and fields.get("verify") != "image":
        problems.add(f'{where}: `prompts` are for verify = "image"')
    if fields.get("bias_correction") and fields.get("inputs") is None:
        problems.add(f"{where}: `bias_correction` needs `inputs`")
    source = fields.get("source")
    if source is None:
        return None
    fields.setdefault("name", _stem(source))
    return Settings(**fields)


def _stem(source: Path | str) -> str:
    """The source's own name: a folder's, or a file's without its extension."""
    if isinstance(source, Path):
        # No link is followed: in a hub's cache files are called by a hash.
        source = Path(os.path.abspath(source))  # noqa: PTH100
        return source.name if source.is_dir() else source.stem
    last = source.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]
    return re.sub(r"[^\w.\-]", "_", last.removesuffix(".safetensors").removesuffix(".gguf"))
