"""Key rules: how the tensors of one naming become the tensors of another, as data.

A rule consumes source keys and yields assignments. An assignment says which rows of which source
tensors make a target, so that an engine can stream it without knowing any rule:

    target = concatenate(pieces, dim 0), then transposed whole if asked, then viewed as `shape`
    with `axis`: one slice along that axis taken out, or whole tensors stacked as that axis

A *row* here is one slice along dim 0, for vectors one element; a scalar is one row. Fusing,
splitting and reordering are therefore the same thing: ranges of rows, in another order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from diffquant.core.errors import (
    DuplicateTarget,
    MappingError,
    MissingKeys,
    NotInvertible,
    UnmappedKeys,
    shorten,
)

__all__ = [
    "Assignment",
    "Drop",
    "Fuse",
    "Piece",
    "Rename",
    "Reorder",
    "Reshape",
    "Rule",
    "Shape",
    "Shapes",
    "Split",
    "Tie",
    "Transpose",
    "apply_rules",
    "invert",
]

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of the source tensor `key`."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """One target tensor and the source rows it is made of.

    Attributes:
        target: key in the target naming.
        shape: the target's shape.
        pieces: concatenated along dim 0.
        transpose: the (2-D, whole) concatenation is transposed.
        axis: 0, or the axis that pieces count along: a single piece takes slice `start` of it away,
            several are whole tensors that become its slices.
    """

    target: str
    shape: Shape
    pieces: tuple[Piece, ...]
    transpose: bool = False
    axis: int = 0


class Rule(Protocol):
    """What every row does. `shapes` are always those of the rule's own source keys."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Source keys read."""
        ...

    @property
    def targets(self) -> tuple[str, ...]:
        """Target keys written."""
        ...

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target's rows come from; MappingError when the shapes do not allow it."""
        ...

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back; NotInvertible where nothing does."""
        ...


def _rows(shape: Shape) -> int:
    return shape[0] if shape else 1


def _whole(key: str, shapes: Shapes) -> Piece:
    return Piece(key, 0, _rows(shapes[key]))


@dataclass(frozen=True, slots=True)
class _OneToOne:
    source: str
    target: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The one source key."""
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        """The one target key."""
        return (self.target,)


@dataclass(frozen=True, slots=True)
class Rename(_OneToOne):
    """The same tensor under another key."""

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        return (Assignment(self.target, shapes[self.source], (_whole(self.source, shapes),)),)

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        return Rename(self.target, self.source)


@dataclass(frozen=True, slots=True)
class Fuse:
    """Several tensors stacked along dim 0."""

    sources: tuple[str, ...]
    target: str

    @property
    def targets(self) -> tuple[str, ...]:
        """Target keys written."""
        return (self.target,)

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        tails = {shapes[key][1:] for key in self.sources}
        if len(tails) > 1 or any(not shapes[key] for key in self.sources):
            found = ", ".join(f"{key} {shapes[key]}" for key in self.sources)
            raise MappingError(
                f"cannot fuse into {self.target}: expected shapes equal but for dim 0, found "
                f"{found}",
                keys=self.sources,
            )
        rows = sum(shapes[key][0] for key in self.sources)
        pieces = tuple(_whole(key, shapes) for key in self.sources)
        return (Assignment(self.target, (rows, *tails.pop()), pieces),)

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        return Split(self.target, self.sources, tuple(shapes[key][0] for key in self.sources))


@dataclass(frozen=True, slots=True)
class Split:
    """One tensor cut along dim 0 into parts of `rows` rows."""

    source: str
    targets: tuple[str, ...]
    rows: tuple[int, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """Source keys read."""
        return (self.source,)

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        shape = shapes[self.source]
        if not shape or sum(self.rows) != shape[0] or len(self.rows) != len(self.targets):
            raise MappingError(
                f"cannot split {self.source} {shape} into rows {self.rows} for "
                f"{shorten(self.targets)}: they do not add up to dim 0",
                keys=self.sources,
            )
        out, start = [], 0
        for target, rows in zip(self.targets, self.rows, strict=True):
            piece = Piece(self.source, start, start + rows)
            out.append(Assignment(target, (rows, *shape[1:]), (piece,)))
            start += rows
        return tuple(out)

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        return Fuse(self.targets, self.source)


@dataclass(frozen=True, slots=True)
class Reorder(_OneToOne):
    """Equal segments of rows in another order: target segment i is source segment order[i]."""

    order: tuple[int, ...]

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        shape = shapes[self.source]
        if not shape or shape[0] % len(self.order):
            raise MappingError(
                f"cannot reorder {self.source} {shape}: dim 0 is not {len(self.order)} equal "
                "segments",
                keys=self.sources,
            )
        step = shape[0] // len(self.order)
        pieces = tuple(Piece(self.source, i * step, (i + 1) * step) for i in self.order)
        return (Assignment(self.target, shape, pieces),)

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        order = tuple(self.order.index(i) for i in range(len(self.order)))
        return Reorder(self.target, self.source, order)


@dataclass(frozen=True, slots=True)
class Transpose(_OneToOne):
    """A matrix, transposed."""

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        shape = shapes[self.source]
        if len(shape) != 2:
            raise MappingError(
                f"cannot transpose {self.source} {shape}: expected a matrix", keys=self.sources
            )
        piece = _whole(self.source, shapes)
        return (Assignment(self.target, (shape[1], shape[0]), (piece,), transpose=True),)

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        return Transpose(self.target, self.source)


@dataclass(frozen=True, slots=True)
class Reshape(_OneToOne):
    """The same elements in another shape; dim 0 stays, so rows stay rows."""

    shape: Shape

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        shape = shapes[self.source]
        if math.prod(shape) != math.prod(self.shape) or shape[:1] != self.shape[:1]:
            raise MappingError(
                f"cannot view {self.source} {shape} as {self.shape}: element count and dim 0 must "
                "stay",
                keys=self.sources,
            )
        return (Assignment(self.target, self.shape, (_whole(self.source, shapes),)),)

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        return Reshape(self.target, self.source, shapes[self.source])


@dataclass(frozen=True, slots=True)
class Tie(_OneToOne):
    """A second copy of a tensor that another rule consumes."""

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        return (Assignment(self.target, shapes[self.source], (_whole(self.source, shapes),)),)

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        return Drop(self.target, f"copy of {self.source}")


@dataclass(frozen=True, slots=True)
class Drop:
    """A tensor the target naming has no place for; `reason` is printed in the plan."""

    source: str
    reason: str

    @property
    def sources(self) -> tuple[str, ...]:
        """Source keys read."""
        return (self.source,)

    @property
    def targets(self) -> tuple[str, ...]:
        """Target keys written."""
        return ()

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        return ()

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        raise NotInvertible(
            f"cannot invert the drop of {self.source} ({self.reason}): its values are gone",
            keys=self.sources,
        )


def apply_rules(rules: Sequence[Rule], shapes: Shapes) -> tuple[Assignment, ...]:
    """Run rules over a key set, in order, and check that they fit it exactly.

    Raises:
        MissingKeys: a rule reads a key that `shapes` lacks.
        UnmappedKeys: a key that no rule consumes.
        DuplicateTarget: two rules write one key.
        MappingError: a key is consumed twice, or a shape does not allow its rule.
    """
    _refuse(
        MissingKeys,
        "rules need keys that the source lacks",
        (key for rule in rules for key in rule.sources if key not in shapes),
    )
    used = Counter(key for rule in rules if not isinstance(rule, Tie) for key in rule.sources)
    _refuse(UnmappedKeys, "no rule takes these source keys", (k for k in shapes if k not in used))
    _refuse(MappingError, "source keys taken twice", (k for k, n in used.items() if n > 1))
    written = Counter(key for rule in rules for key in rule.targets)
    _refuse(DuplicateTarget, "target keys written twice", (k for k, n in written.items() if n > 1))
    return tuple(one for rule in rules for one in rule.assignments(shapes))


def invert(rules: Sequence[Rule], shapes: Shapes) -> tuple[Rule, ...]:
    """The rules that lead back from the targets of `rules` to `shapes`.

    Raises:
        NotInvertible: a Drop is among them.
    """
    return tuple(rule.inverse(shapes) for rule in rules)


def _refuse(error: type[MappingError], what: str, keys: Iterable[str]) -> None:
    found = tuple(dict.fromkeys(keys))
    if found:
        raise error(f"{what}: {shorten(found)}", keys=found)
