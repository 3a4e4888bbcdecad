"""What the numbers of a weight look like, taken from chunks of rows in any order.

Chunks are float32; every count is exact, mean and standard deviation are good to about five digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FP16_MAX", "ChunkStats", "WeightStats", "chunk_stats", "combine"]

FP16_MAX = 65504.0
# Half of the smallest float16 and below rounds to zero there (ties to even).
_FP16_ZERO = np.float32(2.0**-25)
_PIECE = 1 << 18  # numbers looked at together: 1 MiB; smaller ones make threads wait for the GIL


@dataclass(frozen=True, slots=True)
class ChunkStats:
    """Some rows of a weight; `low`, `high`, `total` and `squares` are of the finite numbers.

    Attributes:
        size: numbers.
        nan, inf: how many are not finite.
        zeros: exact zeros.
        tiny: numbers that are not zero here and would be in float16.
        beyond: finite numbers that float16 cannot hold.
        zero_rows: rows of zeros.
        low, high: smallest and largest; inf and -inf where no number is finite.
        total, squares: sums of numbers and of their squares.
    """

    size: int
    nan: int
    inf: int
    zeros: int
    tiny: int
    beyond: int
    zero_rows: int
    low: float
    high: float
    total: float
    squares: float


@dataclass(frozen=True, slots=True)
class WeightStats:
    """A whole weight; counts as in ChunkStats.

    Attributes:
        rows: how many rows it has.
        low, high: smallest and largest finite number; 0 where there is none.
        mean, std: of the finite numbers.
    """

    size: int
    rows: int
    nan: int
    inf: int
    zeros: int
    tiny: int
    beyond: int
    zero_rows: int
    low: float
    high: float
    mean: float
    std: float

    @property
    def amax(self) -> float:
        """Largest finite magnitude."""
        return max(abs(self.low), abs(self.high))

    @property
    def is_zero(self) -> bool:
        """Whether every number is zero."""
        return self.size > 0 and self.zeros == self.size


def chunk_stats(values: NDArray[np.float32]) -> ChunkStats:
    """Look at (R, K) float32, a piece at a time that stays in a cache."""
    flat = values.reshape(-1)
    with np.errstate(all="ignore"):
        pieces = [_piece(flat[at : at + _PIECE]) for at in range(0, flat.size, _PIECE)]
    zeros = sum(one.zeros for one in pieces)
    return ChunkStats(
        size=flat.size,
        nan=sum(one.nan for one in pieces),
        inf=sum(one.inf for one in pieces),
        zeros=zeros,
        tiny=sum(one.tiny for one in pieces),
        beyond=sum(one.beyond for one in pieces),
        zero_rows=_zero_rows(values, zeros),
        low=min((one.low for one in pieces), default=math.inf),
        high=max((one.high for one in pieces), default=-math.inf),
        total=math.fsum(one.total for one in pieces),
        squares=math.fsum(one.squares for one in pieces),
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    nan: int
    inf: int
    zeros: int
    tiny: int
    beyond: int
    low: float
    high: float
    total: float
    squares: float


def _piece(flat: NDArray[np.float32]) -> _Piece:
    nan = inf = 0
    low, high = float(flat.min()), float(flat.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        size, nan = flat.size, int(np.count_nonzero(np.isnan(flat)))
        flat = flat[np.isfinite(flat)]
        inf = size - nan - flat.size
        low = float(flat.min()) if flat.size else math.inf
        high = float(flat.max()) if flat.size else -math.inf
    magnitudes = np.abs(flat)
    small = magnitudes <= _FP16_ZERO
    few = int(np.count_nonzero(small))  # nearly always next to none: zeros are looked for there
    zeros = few - int(np.count_nonzero(flat[small])) if few else 0
    squares, total = float(np.dot(flat, flat)), float(flat.sum())
    if not (math.isfinite(squares) and math.isfinite(total)):
        total = float(flat.sum(dtype=np.float64))
        squares = float(np.square(flat, dtype=np.float64).sum())
    large = max(-low, high) > FP16_MAX
    return _Piece(
        nan=nan,
        inf=inf,
        zeros=zeros,
        tiny=few - zeros,
        beyond=int(np.count_nonzero(magnitudes > FP16_MAX)) if large else 0,
        low=low,
        high=high,
        total=total,
        squares=squares,
    )


def _zero_rows(values: NDArray[np.float32], zeros: int) -> int:
    if not values.size or zeros < values.shape[1]:  # not enough zeros for one row
        return 0
    return len(values) - int(np.count_nonzero(values.any(axis=1)))


def combine(chunks: Iterable[ChunkStats], *, rows: int) -> WeightStats:
    """Put the chunks of one weight together, in their order, so that a file has one answer."""
    found = list(chunks)
    size = sum(one.size for one in found)
    nan, inf = sum(one.nan for one in found), sum(one.inf for one in found)
    finite = size - nan - inf
    mean = math.fsum(one.total for one in found) / finite if finite else 0.0
    variance = math.fsum(one.squares for one in found) / finite - mean * mean if finite else 0.0
    return WeightStats(
        size=size,
        rows=rows,
        nan=nan,
        inf=inf,
        zeros=sum(one.zeros for one in found),
        tiny=sum(one.tiny for one in found),
        beyond=sum(one.beyond for one in found),
        zero_rows=sum(one.zero_rows for one in found),
        low=min((one.low for one in found), default=0.0) if finite else 0.0,
        high=max((one.high for one in found), default=0.0) if finite else 0.0,
        mean=mean,
        std=math.sqrt(max(variance, 0.0)),
    )
