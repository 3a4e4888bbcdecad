"""scale_search.symmetric_search for 64 sub-blocks side by side; affine_lanes.py says why and how.

grid  rows 0-15 elements x, 16-31 their weights x * x, 32-47 x * x * x
state one row per quantity, named below
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits, nearest_int, select
from diffquant.quant.codecs.numba.lanes import LANES

__all__ = ["FIT_ISCALE", "GRID_ROWS", "PEAK", "SCALE", "STATE_ROWS", "search"]

GRID_ROWS = 48
STATE_ROWS = 7
SCALE = 0  # best so far, of either sign
FIT_ISCALE = 1  # levels of the best candidate: nearest_int(FIT_ISCALE * x)
PEAK = 2  # first element of largest magnitude
_ISCALE = 3
_BEST = 4
_SUM_LX = 5
_SUM_L2 = 6
_SIZE = 16
_ZERO = np.float32(0)
_STEP = np.float32(0.1)


@inlined
def _prepare(grid: Float32, state: Float32) -> None:
    for k in range(LANES):
        state[PEAK, k] = _ZERO
    for i in range(_SIZE):
        for k in range(LANES):
            x, peak = grid[i, k], state[PEAK, k]
            above = np.int32(-np.int32(magnitude_bits(x) > magnitude_bits(peak)))
            state[PEAK, k] = select(above, x, peak)
            square = np.float32(x * x)
            grid[_SIZE + i, k] = square
            grid[2 * _SIZE + i, k] = np.float32(square * x)


@inlined
def _sum_levels(grid: Float32, state: Float32, half: np.int32, step: int) -> None:
    intervals = np.float32(np.float32(half) + np.float32(_STEP * np.float32(step)))
    for k in range(LANES):
        state[_ISCALE, k] = np.float32(-intervals / state[PEAK, k])
        state[_SUM_LX, k] = _ZERO
        state[_SUM_L2, k] = _ZERO
    for i in range(0, _SIZE, 4):
        for k in range(LANES):
            iscale = state[_ISCALE, k]
            sum_lx, sum_l2 = state[_SUM_LX, k], state[_SUM_L2, k]
            for j in range(4):
                integer = nearest_int(np.float32(iscale * grid[i + j, k]))
                integer = integer if integer > np.int32(-half) else np.int32(-half)
                integer = integer if integer < half else np.int32(half - np.int32(1))
                level = np.float32(integer)
                weighted = np.float32(grid[_SIZE + i + j, k] * level)
                sum_lx = np.float32(sum_lx + np.float32(grid[2 * _SIZE + i + j, k] * level))
                sum_l2 = np.float32(sum_l2 + np.float32(weighted * level))
            state[_SUM_LX, k] = sum_lx
            state[_SUM_L2, k] = sum_l2


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
def search(grid: Float32, state: Float32, half: np.int32) -> None:
    """Search all lanes; see scale_search.symmetric_search for the method.

    Args:
        grid: (GRID_ROWS, LANES), elements in rows 0-15; the rest is scratch.
        state: (STATE_ROWS, LANES), scratch; on return SCALE, FIT_ISCALE and PEAK hold. Where the
            peak is below GROUP_MAX_EPS the scale means nothing: the caller takes 0.
        half: the level of zero.
    """
    _prepare(grid, state)
    _sum_levels(grid, state, half, 0)
    _keep_first(state)
    for step in range(-9, 10):
        if step != 0:
            _sum_levels(grid, state, half, step)
            _keep_better(state)
