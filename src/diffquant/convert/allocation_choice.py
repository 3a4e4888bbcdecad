"""Choice: what an allocation chose, as data that can be kept and taken up again without measuring.

A batch keeps it in its journal: what was stopped goes on with the same formats, and what is done is
planned again in no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffquant.convert.recipes import Recipe
from diffquant.convert.request import Request
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES, QuantType

__all__ = ["Choice", "choice_from", "mixed_type"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice without the request that it was made for.

    Attributes:
        architecture: slug of the source.
        part: whose weights were chosen for.
        formats: canonical key -> format.
        reasons: canonical key -> why, where it is not only that it was allocated.
        type: what the file calls its type, after its bits.
        base: TYPES name that stands for its formats in a plan.
        file_type: llama.cpp's number for the file.
        target: which program it is for.
        allocated: what the header says of it.
        notes: where errors are from, and what was assumed or left out.
    """

    architecture: str
    part: str
    formats: Mapping[str, str]
    reasons: Mapping[str, str]
    type: str
    base: str
    file_type: int | None
    target: str
    allocated: str
    notes: tuple[str, ...] = ()

    def into(self, request: Request) -> Request:
        """The request that stores these formats; all else is as asked."""
        recipe = Recipe(
            self.architecture,
            "",
            {self.part: self.formats},
            why="allocated",
            reasons=self.reasons,
        )
        return replace(
            request,
            type=replace(mixed_type(TYPES[self.base], self.file_type), name=self.type),
            recipe=recipe,
            target=self.target,
            allocated=self.allocated,
            pure=False,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for `choice_from`."""
        return {**asdict(self), "notes": list(self.notes)}


def mixed_type(kind: QuantType, file_type: int | None) -> QuantType:
    """The type of a file whose formats a recipe says: without a mix of its own."""
    return replace(kind, mix={}, edge="", tuned={}, published=False, file_type=file_type)


def choice_from(row: object) -> Choice:
    """Read a choice that was kept.

    Raises:
        ValueError: it is none.
    """
    names = Choice.__dataclass_fields__
    if not isinstance(row, dict) or row.keys() != names.keys():
        raise ValueError("no choice of formats")
    texts = ("architecture", "part", "type", "base", "target", "allocated")
    tables = ("formats", "reasons")
    sound = (
        all(isinstance(row[name], str) for name in texts)
        and all(isinstance(row[name], dict) for name in tables)
        and all(isinstance(one, str) for name in tables for one in row[name].values())
        and isinstance(row["notes"], list)
        and all(isinstance(one, str) for one in row["notes"])
        and (row["file_type"] is None or type(row["file_type"]) is int)
    )
    if not sound or row["base"] not in TYPES or not FORMATS.keys() >= set(row["formats"].values()):
        raise ValueError("no choice of formats")
    return Choice(**{**row, "notes": tuple(row["notes"])})
