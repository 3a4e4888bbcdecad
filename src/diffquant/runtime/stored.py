"""Weights still in their file: what they will look like is known, their bytes are not read.

A `StoredWeight` is planned with and placed before a byte moves: its outline is a PackedWeight of
meta tensors, with the dtypes, shapes and sizes that loading will give. Loading it again gives new
tensors: who loads decides how long they live.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.runtime.layers import PackedWeight, Segment

__all__ = ["StoredPart", "StoredSegment", "StoredWeight", "rows_of"]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One tensor of a packed weight.

    Attributes:
        outline: a meta tensor like the one `load` returns.
        load: read it from the file, as a tensor of its own on the CPU.
        load_rows: read only these rows, in this order; None where rows are not apart in the file.
    """

    outline: Tensor
    load: Callable[[], Tensor]
    load_rows: Callable[[Sequence[int]], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes it takes once loaded."""
        return self.outline.nbytes


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """Consecutive rows of a weight in one number format; see layers.Segment."""

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, StoredPart]

    @property
    def outline(self) -> Segment:
        """The segment in meta tensors."""
        parts = {name: part.outline for name, part in self.parts.items()}
        return Segment(self.format, self.shape, parts)

    def load(self) -> Segment:
        """Read every part."""
        parts = {name: part.load() for name, part in self.parts.items()}
        return Segment(self.format, self.shape, parts)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight in its file; see layers.PackedWeight.

    Attributes:
        segments: at least one.
        outline: the weight in meta tensors.
    """

    segments: tuple[StoredSegment, ...]
    outline: PackedWeight

    @classmethod
    def of(cls, segments: Sequence[StoredSegment]) -> StoredWeight:
        """Stack segments.

        Raises:
            UnsupportedShape: they cannot be stacked.
        """
        return cls(tuple(segments), PackedWeight(tuple(one.outline for one in segments)))

    def load(self) -> PackedWeight:
        """Read the whole weight to the CPU."""
        return PackedWeight(tuple(one.load() for one in self.segments))

    def load_rows(self, index: Tensor) -> PackedWeight | None:
        """Read the rows named by `index` (n,) integer: a weight of n rows, in that order.

        None where the file does not hold rows apart, or the weight is of several segments.
        """
        segment = self.segments[0]
        if len(self.segments) > 1:
            return None
        wanted = index.tolist()
        parts: dict[str, Tensor] = {}
        for name, part in segment.parts.items():
            by_row = part.outline.ndim > 0 and part.outline.shape[0] == segment.shape[0]
            if by_row and part.load_rows is None:
                return None
            parts[name] = part.load_rows(wanted) if by_row and part.load_rows else part.load()
        shape = (len(wanted), *segment.shape[1:])
        return PackedWeight((Segment(segment.format, shape, parts),))


def rows_of(read: Callable[[int, int], Tensor], wanted: Sequence[int]) -> Tensor:
    """Stack single rows, each read once: (n, ...).

    Args:
        read: (first row, end) -> tensor of these rows.
        wanted: rows, in any order, repeated or not.
    """
    once = {row: read(row, row + 1) for row in dict.fromkeys(wanted)}
    return torch.cat([once[row] for row in wanted])
