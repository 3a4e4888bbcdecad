"""Grid points for combinations of levels: a table, and a search where the combination is no point.

The candidates of a combination are compared side by side, sixteen at a time: each is a lane that
adds its weighted squared errors in ggml's order (iq_search._nearest). Distances are not negative,
so their bits are ordered as they are, and the least (bits, position) is the first of the nearest.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from diffquant.quant.codecs.arrays import Float32, Int32, frozen
from diffquant.quant.codecs.iq_candidates import code_tables, grid_named
from diffquant.quant.codecs.numba.compile import inlined

__all__ = ["MOVED", "Tables", "place_eights", "place_fours", "tables_named"]

_CHUNK = 16
_COUNT_BITS = 5  # of a combination's entry: its number of chunks
_COUNT = np.int32((1 << _COUNT_BITS) - 1)
_NONE = np.int64(2**63 - 1)
_LARGEST = np.uint32(0x7F7FFFFF)  # bits of the largest distance; infinity and NaN are none nearer
_POSITION = np.int64(0xFFFFFFFF)
MOVED = np.int32(-(2**31))  # set in the code of a group whose combination is no grid point

Tables = tuple[Int32, Int32]


@cache
def tables_named(name: str) -> Tables:
    """Entries and candidates of a format's grid, as `code_tables` makes them."""
    entries, candidates = code_tables(grid_named(name), _CHUNK, _COUNT_BITS)
    return frozen(entries, entries.shape), frozen(candidates, candidates.shape)


@inlined
def _term(
    code: np.int32, at: int, mask: int, scale: np.float32, x: np.float32, w: np.float32
) -> np.float32:
    odd = np.float32(np.int32(np.int32(code >> np.int32(at)) & np.int32(mask)))
    diff = (scale * odd) - x
    return (w * diff) * diff


@inlined
def _nearer(best: np.int64, distance: np.float32, position: int) -> np.int64:
    size = np.uint32(np.float32(distance).view(np.uint32))
    bits = np.int64(size if size < _LARGEST else _LARGEST)
    ranked = np.int64(np.int64(bits << np.int64(32)) | np.int64(position))
    return ranked if ranked < best else best


@inlined
def place_fours(
    grid: Float32,
    root: int,
    g: int,
    k: int,
    scales: Float32,
    tables: Tables,
    code: Int32,
    stop: int,
) -> None:
    """Place group g of four in lane k at the scales of candidates 0 to stop - 1.

    Combinations in code (candidates, groups, LANES) become codes of grid points, MOVED added where
    they were no point. Square roots of weights stand from row `root` of grid on; the scale of
    candidate n stands in row 2 n + 1 of scales.
    """
    entries, candidates = tables
    i, j = 4 * g, root + 4 * g
    # Loaded once, by name: in a loop over the four they would be loaded for every candidate.
    x0, x1, x2, x3 = grid[i, k], grid[i + 1, k], grid[i + 2, k], grid[i + 3, k]
    w0, w1, w2, w3 = grid[j, k], grid[j + 1, k], grid[j + 2, k], grid[j + 3, k]
    for n in range(stop):
        entry = entries[code[n, g, k]]
        if entry < np.int32(0):
            scale = scales[2 * n + 1, k]
            first = np.int32(np.int32(-entry) >> np.int32(_COUNT_BITS))
            best = _NONE
            for c in range(np.int32(np.int32(-entry) & _COUNT)):
                for t in range(_CHUNK):
                    found = candidates[first + c, t]
                    d = _term(found, 0, 15, scale, x0, w0)
                    d = d + _term(found, 4, 15, scale, x1, w1)
                    d = d + _term(found, 8, 15, scale, x2, w2)
                    d = d + _term(found, 12, 15, scale, x3, w3)
                    best = _nearer(best, d, _CHUNK * c + t)
            position = np.int64(best & _POSITION)
            entry = candidates[first + position // _CHUNK, position % _CHUNK] | MOVED
        code[n, g, k] = entry


@inlined
def place_eights(
    grid: Float32,
    root: int,
    g: int,
    k: int,
    scales: Float32,
    tables: Tables,
    code: Int32,
    stop: int,
) -> None:
    """Place a group of eight, as `place_fours` does one of four."""
    entries, candidates = tables
    i, j = 8 * g, root + 8 * g
    x0, x1, x2, x3 = grid[i, k], grid[i + 1, k], grid[i + 2, k], grid[i + 3, k]
    x4, x5, x6, x7 = grid[i + 4, k], grid[i + 5, k], grid[i + 6, k], grid[i + 7, k]
    w0, w1, w2, w3 = grid[j, k], grid[j + 1, k], grid[j + 2, k], grid[j + 3, k]
    w4, w5, w6, w7 = grid[j + 4, k], grid[j + 5, k], grid[j + 6, k], grid[j + 7, k]
    for n in range(stop):
        entry = entries[code[n, g, k]]
        if entry < np.int32(0):
            scale = scales[2 * n + 1, k]
            first = np.int32(np.int32(-entry) >> np.int32(_COUNT_BITS))
            best = _NONE
            for c in range(np.int32(np.int32(-entry) & _COUNT)):
                for t in range(_CHUNK):
                    found = candidates[first + c, t]
                    d = _term(found, 0, 7, scale, x0, w0)
                    d = d + _term(found, 3, 7, scale, x1, w1)
                    d = d + _term(found, 6, 7, scale, x2, w2)
                    d = d + _term(found, 9, 7, scale, x3, w3)
                    d = d + _term(found, 12, 7, scale, x4, w4)
                    d = d + _term(found, 15, 7, scale, x5, w5)
                    d = d + _term(found, 18, 7, scale, x6, w6)
                    d = d + _term(found, 21, 7, scale, x7, w7)
                    best = _nearer(best, d, _CHUNK * c + t)
            position = np.int64(best & _POSITION)
            entry = candidates[first + position // _CHUNK, position % _CHUNK] | MOVED
        code[n, g, k] = entry
