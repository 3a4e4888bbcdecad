"""How a map is cut into strips: which rows a strip of a layer's output needs, and how many it has.

Shared by the runtime, which computes feature maps in strips (runtime/models/feature_map.py), and by
the arithmetic that predicts its memory (footprint/strips.py), so that both mean the same strips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["CONV", "DOUBLE", "HALVE", "POINT", "STRIP_NBYTES", "Reach", "cuts", "rows_for"]

STRIP_NBYTES = 16 << 20  # of a strip of the wider of a layer's two maps


@dataclass(frozen=True, slots=True)
class Reach:
    """How rows of a layer's output hang on rows of its input; columns likewise.

    Row r of the output is made of rows r * down / up, `halo` more on either side.

    Attributes:
        halo: rows of the input; a multiple of `down`, so that strips start where strides do.
        up, down: how often the layer doubles or halves the size, as a factor.
        ceil: whether an odd size is halved to the larger half.
    """

    halo: int = 0
    up: int = 1
    down: int = 1
    ceil: bool = False

    def size(self, before: int) -> int:
        """Rows, or columns, of the output."""
        return (before * self.up + (self.down - 1 if self.ceil else 0)) // self.down

    def needed(self, first: int, last: int, height: int) -> tuple[int, int, int]:
        """What rows [first, last) of the output need of an input so high.

        Returns:
            The input's rows [start, stop), and which row of what they make is `first`.
        """
        start = max(0, first * self.down // self.up - self.halo)
        stop = min(height, -(-last * self.down // self.up) + self.halo)
        return start, stop, first - start * self.up // self.down


POINT = Reach()
CONV = Reach(1)
DOUBLE = Reach(1, up=2)  # nearest neighbour, then a convolution
HALVE = Reach(2, down=2)  # a convolution of stride 2


def rows_for(reach: Reach, channels: tuple[int, int], size: tuple[int, int], itemsize: int) -> int:
    """Rows of an output strip that keep it within STRIP_NBYTES, one at least; strips are alike.

    Args:
        reach: of the layer.
        channels: of its input and output.
        size: height and width of the input.
        itemsize: bytes of a number.
    """
    (before, after), (high, wide) = channels, size
    row = max(before * wide * reach.up * reach.down, after * reach.size(wide)) * itemsize
    height, most = reach.size(high), max(1, STRIP_NBYTES // row)
    strips = -(-height // most)
    return -(-height // max(1, strips))


def cuts(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """First row and last + 1 of each strip."""
    for first in range(0, height, rows):
        yield first, min(first + rows, height)
