"""Want: one entry of `types`: a type, a budget, or a recipe.

    types = [
        "q4_k_m",                                             # a type
        { max_size = "6GB" },                                 # or bpw, or vram: a budget
        { bpw = 4.6, among = ["q3_k", "q4_k", "q6_k"], sensitivity = "s.json", free_kept = true },
        { recipe = "flux.txt" },                              # of a file; `type` labels it
        { type = "iq2_xs", imatrix = "m.gguf" },              # each may have its own matrix
    ]

Names are those of `quantize`'s options. A file is called after what was asked for, not after what
was chosen: its name stays when a later measurement chooses other formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.convert.allocation_options import container_of
from diffquant.convert.budgets import Budget, budget_of
from diffquant.convert.output_names import file_name, output_name
from diffquant.convert.recipe_source import load_recipe
from diffquant.core.errors import DiffquantError, UnknownFormat, closest
from diffquant.publish.batch.values import UnknownNameError, file_path, flag, is_name, many, text
from diffquant.quant.types import dialect_for, type_named

__all__ = ["Want", "read_want", "want_of"]

_BUDGETS = {"max_size": "--max-size", "bpw": "--bpw", "vram": "--vram"}
_OF_BUDGETS = ("among", "sensitivity", "free_kept")
_KNOWN = ("type", *_BUDGETS, "recipe", *_OF_BUDGETS, "imatrix")


@dataclass(frozen=True, slots=True)
class Want:
    """What one output of a model is to be.

    Attributes:
        label: what its file is called after: a type's name, `6GB`, `4.6bpw`, a recipe's own.
        type: TYPES name, "" under a budget.
        budget: in place of a type.
        sensitivity: file of predicted errors; None looks for one.
        recipe: file that formats are taken from.
        imatrix: importance matrices in place of the model's, () for those.
    """

    label: str
    type: str = ""
    budget: Budget | None = None
    sensitivity: Path | None = None
    recipe: Path | None = None
    imatrix: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return self.label

    @property
    def reads(self) -> tuple[Path, ...]:
        """Files of its own."""
        given = (self.sensitivity, self.recipe, *self.imatrix)
        return tuple(one for one in given if one is not None)

    def container(self, target: str) -> str:
        """What it is written to, where nothing else was asked for.

        Raises:
            UnknownFormat, UsageError: nothing holds its formats.
        """
        if self.budget is not None:
            return container_of(self.budget.among, target)
        return next(iter(type_named(self.type).dialects))

    def check(self, container: str) -> None:
        """Refuse a container that cannot hold it.

        Raises:
            UsageError, PolicyError: see the message.
        """
        if self.budget is None:
            dialect_for(type_named(self.type), container)

    def file_name(self, stem: str, container: str) -> str:
        """The output's name."""
        if self.budget is None and self.recipe is None:
            return output_name(stem, type_named(self.type), container)
        return file_name(container, stem, self.label)


def want_of(name: str) -> Want:
    """A type, by its name.

    Raises:
        UnknownFormat: no such type.
    """
    kind = type_named(name)
    return Want(kind.name, kind.name)


def read_want(value: Any, folder: Path) -> Want:  # noqa: ANN401 - any TOML value
    """Read an entry; paths are relative to `folder`.

    Raises:
        ValueError: what was expected.
    """
    try:
        if not isinstance(value, dict):
            return want_of(text(value, folder))
        return _from_table(value, folder)
    except UnknownFormat as error:
        raise UnknownNameError(f"something known: {error}") from None
    except DiffquantError as error:
        raise ValueError(f"something known: {error}") from None


def _from_table(table: Mapping[str, Any], folder: Path) -> Want:
    for name in table:
        if name not in _KNOWN:
            near = closest(name[:64], _KNOWN)
            hint = f", did you mean {near!r}?" if near else ""
            raise ValueError(f"no key {name[:64]!r}{hint} (known: {', '.join(_KNOWN)})")
    what = [name for name in (*_BUDGETS, "recipe") if name in table]
    if len(what) > 1:
        raise ValueError(f"one of {', '.join(what)}, which all choose formats")
    if not what and "type" not in table:
        raise ValueError(f"one of type, {', '.join(_BUDGETS)} and recipe in a table")
    matrices = many(file_path)(table["imatrix"], folder) if "imatrix" in table else ()
    if what and what[0] in _BUDGETS:
        return _budgeted(what[0], table, folder, matrices)
    for name in _OF_BUDGETS:
        if name in table:
            raise ValueError(f"`{name}` beside {', '.join(_BUDGETS)} only")
    if what:
        return _of_recipe(table, folder, matrices)
    kind = type_named(text(table["type"], folder))
    return Want(kind.name, kind.name, imatrix=matrices)


def _budgeted(
    name: str, table: Mapping[str, Any], folder: Path, matrices: tuple[Path, ...]
) -> Want:
    if "type" in table:
        raise ValueError(f"type or {name}, which both choose formats")
    value = table[name]
    if name == "bpw":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("a number for `bpw`, such as 4.6")
    else:
        value = text(value, folder)
    budget = budget_of(
        _BUDGETS[name],
        value,
        _among(table["among"], folder) if "among" in table else (),
        free_kept=flag(table.get("free_kept", False), folder),
    )
    spelled = budget.text.partition(" ")[2].replace(" ", "")
    label = {"max_size": spelled, "bpw": f"{spelled}bpw", "vram": f"{spelled}-vram"}[name]
    return Want(
        label + ("-freed" if budget.free_kept else ""),
        budget=budget,
        sensitivity=file_path(table["sensitivity"], folder) if "sensitivity" in table else None,
        imatrix=matrices,
    )


def _among(value: Any, folder: Path) -> tuple[str, ...]:  # noqa: ANN401
    """Formats as a list, or as --among has them."""
    if isinstance(value, str):
        value = [one.strip() for one in value.split(",") if one.strip()]
    if not value:
        raise ValueError("formats for `among`, such as q3_k,q4_k,q6_k")
    found: tuple[str, ...] = many(text)(value, folder)
    return found


def _of_recipe(table: Mapping[str, Any], folder: Path, matrices: tuple[Path, ...]) -> Want:
    path = file_path(table["recipe"], folder)
    stated = type_named(text(table["type"], folder)).name if "type" in table else ""
    kind = stated or load_recipe(path).type
    if not kind:
        raise ValueError(f"`type` beside recipe {path.name}, which names none that is known here")
    label = path.resolve().name if path.is_dir() else path.stem
    if not is_name(label):
        raise ValueError(f"a recipe whose name can be part of a file's, not {label!r:.60}")
    return Want(label, kind, recipe=path, imatrix=matrices)
