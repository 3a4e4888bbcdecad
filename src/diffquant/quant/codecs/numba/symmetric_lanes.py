"""scale_search.symmetric_search for 64 sub-blocks side by side; affine_lanes.py says why and how.

grid  (3 * size, LANES): rows of elements x, of their weights w, and of w * x
state one row per quantity, named below

Candidate levels are rounded and clipped as floats, in five instructions instead of seven: an
element is at most the peak, so it is scaled to at most the candidate's intervals, where adding and
subtracting 1.5 * 2**23 rounds as ggml's integers do.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import nearest_int, select
from diffquant.quant.codecs.numba.lanes import LANES
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS

__all__ = ["FIT_ISCALE", "PEAK", "SCALE", "STATE_ROWS", "clipped_level", "is_empty", "search"]

STATE_ROWS = 7
SCALE = 0  # best so far, of either sign; 0 where the peak is below GROUP_MAX_EPS
FIT_ISCALE = 1  # levels of the best candidate: nearest_int(FIT_ISCALE * x)
PEAK = 2  # first element of largest magnitude
_ISCALE = 3
_BEST = 4
_SUM_LX = 5
_SUM_L2 = 6
_ZERO = np.float32(0)
_ONE = np.float32(1)
_STEP = np.float32(0.1)
_MAGIC = np.float32(12582912.0)


@inlined
def clipped_level(scaled: np.float32, half: np.int32) -> np.uint8:
    """Round a scaled element to its stored level, 0 to 2 * half - 1."""
    level = nearest_int(scaled)
    level = level if level > np.int32(-half) else np.int32(-half)
    level = level if level < half else np.int32(half - np.int32(1))
    return np.uint8(np.int32(level + half))


@inlined
def is_empty(peak: np.float32) -> bool:
    """Whether a sub-block with this peak is stored with scale 0 and levels 0."""
    return bool(abs(peak) < GROUP_MAX_EPS)


@inlined
def _prepare(grid: Float32, state: Float32, size: int, weighted: bool) -> None:
    for k in range(LANES):
        state[PEAK, k] = _ZERO
    for i in range(size):
        for k in range(LANES):
            x, peak = grid[i, k], state[PEAK, k]
            above = np.int32(-np.int32(abs(x) > abs(peak)))  # never of NaN
            state[PEAK, k] = select(above, x, peak)
    if not weighted:
        for i in range(size):
            for k in range(LANES):
                grid[size + i, k] = np.float32(grid[i, k] * grid[i, k])
    for i in range(size):
        for k in range(LANES):
            grid[2 * size + i, k] = np.float32(grid[size + i, k] * grid[i, k])


@inlined
def _at(row: int, k: int) -> np.uint64:
    """Index of a row's lane in a flat grid; unsigned, or numba tests every index for its sign."""
    return np.uint64(np.uint64(row) * np.uint64(LANES) + np.uint64(k))


@inlined
def _sum_levels(grid: Float32, state: Float32, size: int, half: np.float32, step: int) -> None:
    # Both arrays flat: where rows are a known number of bytes apart, few overlaps remain to test.
    intervals = np.float32(half + np.float32(_STEP * np.float32(step)))
    least, most = np.float32(-half), np.float32(half - _ONE)
    for k in range(LANES):
        state[_at(_ISCALE, k)] = np.float32(-intervals / state[_at(PEAK, k)])
        state[_at(_SUM_LX, k)] = _ZERO
        state[_at(_SUM_L2, k)] = _ZERO
    for i in range(0, size, 8):
        for k in range(LANES):
            iscale = state[_at(_ISCALE, k)]
            sum_lx, sum_l2 = state[_at(_SUM_LX, k)], state[_at(_SUM_L2, k)]
            for j in range(8):
                scaled = np.float32(iscale * grid[_at(i + j, k)])
                level = np.float32(np.float32(scaled + _MAGIC) - _MAGIC)
                level = level if level > least else least
                level = level if level < most else most
                weighted = np.float32(grid[_at(size + i + j, k)] * level)
                product = np.float32(grid[_at(2 * size + i + j, k)] * level)
                sum_lx = np.float32(sum_lx + product)
                sum_l2 = np.float32(sum_l2 + np.float32(weighted * level))
            state[_at(_SUM_LX, k)] = sum_lx
            state[_at(_SUM_L2, k)] = sum_l2


@inlined
def _keep_first(state: Float32) -> None:
    for k in range(LANES):
        sum_lx, sum_l2 = state[_SUM_LX, k], state[_SUM_L2, k]
        fit = np.float32(sum_lx / sum_l2)
        scale = fit if sum_l2 != _ZERO else _ZERO
        state[SCALE, k] = scale
        state[_BEST, k] = np.float32(scale * sum_lx)
        state[FIT_ISCALE, k] = state[_ISCALE, k]


@inlined
def _keep_better(state: Float32) -> None:
    for k in range(LANES):
        sum_lx, sum_l2 = state[_SUM_LX, k], state[_SUM_L2, k]
        fit = np.float32(sum_lx / sum_l2)
        gain = np.float32(sum_lx * sum_lx) > np.float32(state[_BEST, k] * sum_l2)
        better = np.int32(-np.int32(np.int32(sum_l2 > _ZERO) & np.int32(gain)))
        state[SCALE, k] = select(better, fit, state[SCALE, k])
        state[_BEST, k] = select(better, np.float32(fit * sum_lx), state[_BEST, k])
        state[FIT_ISCALE, k] = select(better, state[_ISCALE, k], state[FIT_ISCALE, k])


@kernel
def search(grid: Float32, state: Float32, size: int, half: np.float32, weighted: bool) -> None:
    """Search all lanes; see scale_search.symmetric_search for the method.

    Args:
        grid: (3 * size, LANES) or more: elements in the first `size` rows, their weights in the
            next if `weighted`; the rest is scratch.
        state: (STATE_ROWS, LANES), scratch; on return SCALE, FIT_ISCALE and PEAK hold.
        size: elements of a sub-block, a multiple of 8; not a constant, or compiling takes seconds.
        half: the level of zero.
        weighted: whether `grid` holds weights; else they are the elements squared.
    """
    _prepare(grid, state, size, weighted)
    flat, rows = grid.reshape(grid.size), state.reshape(state.size)
    _sum_levels(flat, rows, size, half, 0)
    _keep_first(state)
    for step in range(-9, 10):
        if step != 0:
            _sum_levels(flat, rows, size, half, step)
            _keep_better(state)
    for k in range(LANES):
        if is_empty(state[PEAK, k]):
            state[SCALE, k] = _ZERO
