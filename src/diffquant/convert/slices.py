"""Rules for axes other than the first: a tensor cut into its slices, and slices stacked again.

llama.cpp has no five-dimensional tensors, so that a convolution over time is one file tensor per
moment. Rows stay rows: both directions stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffquant.convert.rules import Assignment, Piece, Rule, Shapes
from diffquant.core.errors import MappingError, shorten

__all__ = ["Slices", "Stack"]


@dataclass(frozen=True, slots=True)
class Slices:
    """One tensor cut along a later axis into its slices, which lose that axis."""

    source: str
    targets: tuple[str, ...]
    axis: int

    @property
    def sources(self) -> tuple[str, ...]:
        """Source keys read."""
        return (self.source,)

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        shape = shapes[self.source]
        if len(shape) <= self.axis or shape[self.axis] != len(self.targets):
            raise MappingError(
                f"cannot cut {self.source} {shape} into {len(self.targets)} slices of axis "
                f"{self.axis}",
                keys=self.sources,
            )
        rest = shape[: self.axis] + shape[self.axis + 1 :]
        return tuple(
            Assignment(target, rest, (Piece(self.source, i, i + 1),), axis=self.axis)
            for i, target in enumerate(self.targets)
        )

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        return Stack(self.targets, self.source, self.axis)


@dataclass(frozen=True, slots=True)
class Stack:
    """Several tensors of one shape as the slices of a new axis."""

    sources: tuple[str, ...]
    target: str
    axis: int

    @property
    def targets(self) -> tuple[str, ...]:
        """Target keys written."""
        return (self.target,)

    def assignments(self, shapes: Shapes) -> tuple[Assignment, ...]:
        """Where each target comes from."""
        found = {shapes[key] for key in self.sources}
        shape = next(iter(found))
        if len(found) > 1 or len(shape) < self.axis:
            raise MappingError(
                f"cannot stack {shorten(self.sources)} into {self.target}: expected one shape of "
                f"{self.axis} dimensions or more, found {sorted(found)}",
                keys=self.sources,
            )
        whole = (*shape[: self.axis], len(self.sources), *shape[self.axis :])
        pieces = tuple(Piece(key, 0, shape[0]) for key in self.sources)
        return (Assignment(self.target, whole, pieces, axis=self.axis),)

    def inverse(self, shapes: Shapes) -> Rule:
        """The rule that leads back."""
        return Slices(self.target, self.sources, self.axis)
