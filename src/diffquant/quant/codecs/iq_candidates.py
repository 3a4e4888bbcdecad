"""What an encoder of IQ2 and IQ3 needs to land on the points of a grid (grids.py).

A group of 8 (IQ2) or 4 (IQ3) magnitudes is stored as the index of one grid point; only that many of
the possible combinations of levels exist. Level l stands for 2 l + 1 while encoding, and for the
grid's l-th value when decoding; there are three levels in IQ2, eight in IQ3. Levels that are no
grid point are moved to one of a few nearest points, chosen by weighted error: those candidates are
the points at the one, two or three smallest distances, nearest first, of equal distance the lowest
index first. Source: ggml-quants.c iq2xs_init_impl and iq3xs_init_impl, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Int32
from diffquant.quant.codecs.grids import grid

__all__ = ["Grid", "code_tables", "grid_named"]


@dataclass(frozen=True, slots=True)
class Grid:
    """The points of one format; a combination is a number whose lowest digit is its first level.

    Attributes:
        levels: (points, group) levels of each point.
        base: number of levels, the base of a combination's digits.
        point: (base ** group,) index of a combination's point, -1 where it is not on the grid.
        first: (base ** group + 1,) where a combination's candidates begin in `candidates`.
        candidates: indices of points, nearest first; none for combinations on the grid.
    """

    levels: Bytes
    base: int
    point: Int32
    first: Int32
    candidates: Int32

    @property
    def group(self) -> int:
        """Magnitudes that one index stores."""
        return int(self.levels.shape[1])

    @property
    def code_bits(self) -> int:
        """Bits that hold the largest 2 l + 1."""
        return (2 * self.base - 1).bit_length()


# Distances that count as near: iq2xs_init_impl and iq3xs_init_impl, `nwant`.
_DISTANCES = {"iq2_xxs": 2, "iq2_xs": 2, "iq2_s": 1, "iq3_xxs": 2, "iq3_s": 3}
_LOCK = threading.Lock()
_BUILT: dict[str, Grid] = {}


def grid_named(name: str) -> Grid:
    """The grid of a format, built at first use (0.1 to 0.4 s) and kept."""
    with _LOCK:
        if name not in _BUILT:
            _BUILT[name] = _build(name)
        return _BUILT[name]


def code_tables(grid: Grid, chunk: int, count_bits: int) -> tuple[Int32, Int32]:
    """Tables of codes: a point's code has a field of `code_bits` for each level l, 2 l + 1 in it.

    Args:
        grid: of a format.
        chunk: candidates that are compared at once.
        count_bits: bits that hold the largest number of chunks.

    Returns:
        entries: per combination the code of its grid point, or where it is none, minus (first chunk
            << count_bits | chunks); candidates: (chunks, chunk) codes, the last one repeated.
    """
    shifts = grid.code_bits * np.arange(grid.group)
    codes = ((2 * grid.levels.astype(np.int64) + 1) << shifts).sum(axis=1)
    counts = np.diff(grid.first)
    chunks = -(-counts // chunk)
    assert chunks.max() < 1 << count_bits
    first = chunks.cumsum() - chunks
    entries = np.where(grid.point >= 0, codes[grid.point], -(first << count_bits | chunks))
    row = np.arange(len(counts)).repeat(chunks * chunk)  # combination of every slot
    place = np.arange(len(row)) - (first * chunk)[row]
    place = np.minimum(place, counts[row] - 1)
    candidates = codes[grid.candidates[grid.first[row] + place]].reshape(-1, chunk)
    return entries.astype(np.int32), candidates.astype(np.int32)


def _build(name: str) -> Grid:
    magnitudes = grid(name)
    group = magnitudes.shape[1]
    values = np.unique(magnitudes)
    levels, base = np.searchsorted(values, magnitudes).astype(np.uint8), len(values)
    digits = base ** np.arange(group)
    point = np.full(base**group, -1, np.int32)
    point[levels.astype(np.int64) @ digits] = np.arange(len(levels), dtype=np.int32)
    first, candidates = _candidates(levels, base, point, _DISTANCES[name])
    return Grid(levels, base, point, first, candidates)


def _candidates(levels: Bytes, base: int, point: Int32, distances: int) -> tuple[Int32, Int32]:
    group = levels.shape[1]
    off = np.flatnonzero(point < 0)
    wanted = (off[:, None] // base ** np.arange(group) % base).astype(np.float32)
    have = levels.astype(np.float32)
    # Squared distances in steps of a level, exact in float32: |a|^2 + |b|^2 - 2 a b.
    squares = (wanted * wanted).sum(axis=1)[:, None] + (have * have).sum(axis=1)
    distance = (squares - wanted @ have.T * 2).astype(np.int16)  # (off, points)
    limit = distance.min(axis=1, keepdims=True)
    for _ in range(distances - 1):
        beyond = np.where(distance > limit, distance, np.int16(np.iinfo(np.int16).max))
        limit = beyond.min(axis=1, keepdims=True)
    row, index = np.nonzero(distance <= limit)
    nearest_first = np.lexsort((index, distance[row, index], row))
    counts: NDArray[np.int64] = np.zeros(len(point) + 1, np.int64)
    counts[off + 1] = np.bincount(row, minlength=len(off))
    return counts.cumsum().astype(np.int32), index[nearest_first].astype(np.int32)
