"""Which tensors of two files belong together: by name, or by canonical name.

Canonical names are needed where files of one architecture name things differently; there a weight
may be several tensors of one file and one of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from diffquant.convert.detect import Match, detect, to_canonical
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.convert.rules import Assignment, Piece
from diffquant.core.errors import ArchitectureError

__all__ = ["Entry", "Side", "entries", "needs_canonical", "recognise"]


@dataclass(frozen=True, slots=True)
class Side:
    """One opened file."""

    path: Path
    logical: LogicalSource
    match: Match | None

    def naming(self) -> dict[str, tuple[str, str]]:
        """Layout and prefix of every part."""
        parts = self.match.parts if self.match is not None else ()
        return {part.name: (part.layout, part.prefix) for part in parts}


@dataclass(frozen=True, slots=True)
class Entry:
    """A weight of one side, under the name that both sides share."""

    side: Side
    assignment: Assignment
    tensors: tuple[LogicalTensor, ...] = field(default=())

    @property
    def stored(self) -> str:
        """Formats it is stored in; several where pieces differ."""
        names = {tensor.format or tensor.dtype.lower() for tensor in self.tensors}
        return "+".join(sorted(names))

    @property
    def whole(self) -> LogicalTensor | None:
        """The tensor, where it is one and taken as it stands."""
        one = self.assignment
        if len(self.tensors) != 1 or one.transpose:
            return None
        rows = self.tensors[0].shape[0] if self.tensors[0].shape else 1
        return self.tensors[0] if (one.pieces[0].start, one.pieces[0].stop) == (0, rows) else None

    @property
    def physical(self) -> tuple[str, ...]:
        """Keys of all stored tensors that belong to a whole tensor, the weight first."""
        tensor = self.tensors[0]
        if not tensor.why:
            return tuple(dict.fromkeys((tensor.key, *tensor.parts.values())))
        layer = tensor.key.removesuffix("weight")
        others = (key for key in self.side.logical.consumed if key.startswith(layer))
        return (tensor.key, *others)


def recognise(logical: LogicalSource) -> Match | None:
    """What a file is, or None where no one architecture is known for it."""
    try:
        return detect(logical.specs(), logical.source.metadata, logical.source.configs)
    except ArchitectureError:
        return None


def needs_canonical(sides: list[Side]) -> tuple[bool, list[str]]:
    """Whether canonical names are needed, and what the user should know about names."""
    slugs = [side.match.architecture if side.match is not None else "" for side in sides]
    if len(set(slugs)) > 1:
        told = ", ".join(
            f"{side.path.name} is {slug or 'unknown'}"
            for side, slug in zip(sides, slugs, strict=True)
        )
        return False, [f"compared by name: {told}"]
    if not slugs[0]:
        return False, []
    names = [side.naming() for side in sides]
    shared = set.intersection(*(set(one) for one in names))
    return any(len({one[part] for one in names}) > 1 for part in shared), []


def entries(side: Side, *, canonical: bool, parts: tuple[str, ...]) -> dict[str, Entry]:
    """Shared name -> weight."""
    tensors = side.logical.tensors
    found: dict[str, Entry] = {}
    inside: set[str] = set()
    for part in side.match.parts if side.match is not None else ():
        keys = [part.prefix + key for key in part.shapes]
        inside.update(keys)
        if parts and part.name not in parts:
            continue
        if canonical:
            for one in to_canonical(part):
                pieces = tuple(tensors[piece.key] for piece in one.pieces)
                found[f"{part.name}/{one.target}"] = Entry(side, one, pieces)
        else:
            found.update((key, _as_it_is(side, key)) for key in keys)
    if parts:
        return found
    rest = (key for key in tensors if key not in inside)
    return {**found, **{key: _as_it_is(side, key) for key in rest}}


def _as_it_is(side: Side, key: str) -> Entry:
    tensor = side.logical.tensors[key]
    rows = tensor.shape[0] if tensor.shape else 1
    return Entry(side, Assignment(key, tensor.shape, (Piece(key, 0, rows),)), (tensor,))
