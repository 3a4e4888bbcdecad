"""Which outputs a plan file asks for, and that none of them is in another's way."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffquant.core.errors import DiffquantError, UsageError
from diffquant.publish.batch.plan_file import BatchFile, Model
from diffquant.publish.batch.wants import Want

__all__ = ["Item", "items_of"]


@dataclass(frozen=True, slots=True)
class Item:
    """One output: a model as one type, or under one budget, for one target.

    Attributes:
        name: relative to the output folder, with slashes; unique, and what reports call it.
        path: where it is written.
        want: a type, a budget or a recipe.
        target: "" for the container's own default.
    """

    name: str
    path: Path
    want: Want
    target: str
    container: str

    @property
    def type(self) -> str:
        """What reports call what was asked for."""
        return self.want.label


def items_of(file: BatchFile) -> tuple[tuple[Item, ...], ...]:
    """The outputs of every model, in the order of the file.

    Raises:
        UsageError: outputs collide, cannot hold their type, or would replace what is read.
    """
    problems: list[str] = []
    items = tuple(_of_model(model, file.output, problems) for model in file.models)
    problems += _collisions(file.models, items)
    problems += _replaced(file, items)
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UsageError(f"{file.path}: {count}: {'; '.join(problems)}")
    return items


def _of_model(model: Model, folder: Path, problems: list[str]) -> tuple[Item, ...]:
    found = []
    settings = model.settings
    for target in settings.targets or ("",):
        # several targets of one type differ in content, and would not in name
        place = f"{target}/" if len(settings.targets) > 1 else ""
        for want in settings.types:
            try:
                container = settings.container or want.container(target)
                want.check(container)
            except DiffquantError as error:
                problems.append(f"{model.where}: {error}")
                continue
            relative = f"{place}{want.file_name(settings.name, container)}"
            found.append(Item(relative, folder / relative, want, target, container))
    return tuple(found)


def _collisions(models: Sequence[Model], items: Sequence[tuple[Item, ...]]) -> list[str]:
    """Outputs with one name, also where a file system takes two names for one."""
    taken: dict[str, str] = {}
    problems = []
    for model, row in zip(models, items, strict=True):
        for item in row:
            folded = unicodedata.normalize("NFC", item.name).casefold()
            if folded in taken:
                problems.append(
                    f"{model.where}: {item.name} is an output of {taken[folded]} too: give each "
                    "its own `name`"
                )
            taken.setdefault(folded, model.where)
    return problems


def _replaced(file: BatchFile, items: Sequence[tuple[Item, ...]]) -> list[str]:
    """Outputs that are, hold or lie in what any model reads: also one model's input of another."""
    read = {path.resolve(): model.where for model in file.models for path in model.settings.reads}
    read[file.path.resolve()] = "the plan itself"
    above = {folder: path for path in read for folder in path.parents}
    problems = []
    for model, row in zip(file.models, items, strict=True):
        for item in row:
            target = item.path.resolve()
            inside = (one for one in (target, *target.parents) if one in read)
            path = next(inside, above.get(target))
            if path is not None:
                problems.append(
                    f"{model.where}: output {item.path} and {path}, which is read by "
                    f"{read[path]}, are in each other's way: write elsewhere, or make two plans"
                )
    return problems
