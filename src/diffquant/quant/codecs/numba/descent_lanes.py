"""descent_search.descent_search for 64 sub-blocks side by side; affine_lanes.py says why and how.

The moves of a sub-block follow one another, and each costs a division. But most sub-blocks make
none (four of five, with Gaussian weights): their first levels stand. `settle` finds those by a test
without a division and without following moves; `descend` runs the search for the others, gathered
into full lanes by the caller.

grid  rows 0-15 elements x, 16-31 x * x, 32-47 x * x * x, 48-63 levels
state one row per quantity, named below
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32
from diffquant.quant.codecs.descent_search import ROUNDS
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import nearest_int, select
from diffquant.quant.codecs.numba.lanes import LANES
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS

__all__ = ["GRID_ROWS", "LEVEL", "MOVES", "PEAK", "SCALE", "STATE_ROWS", "descend", "settle"]

GRID_ROWS = 64
STATE_ROWS = 5
SCALE = 0  # of either sign; 0 where the peak is below GROUP_MAX_EPS
PEAK = 1  # first element of largest magnitude
MOVES = 2  # not 0 where an element may move
LEVEL = 48  # row of `grid`
_SUM_LX = 3
_SUM_L2 = 4
_SIZE = 16
_CUBE = 32
_ZERO = np.float32(0)
_ONE = np.float32(1)
_NEAR = np.float32(0.4999)


@inlined
def _round(scaled: np.float32, half: np.int32) -> np.float32:
    level = nearest_int(scaled)
    level = level if level > np.int32(-half) else np.int32(-half)
    return np.float32(level if level < half else np.int32(half - np.int32(1)))


@inlined
def _start(grid: Float32, state: Float32, half: np.int32) -> None:
    """Levels against the peak, and their sums."""
    for k in range(LANES):
        state[PEAK, k] = _ZERO
        state[_SUM_LX, k] = _ZERO
        state[_SUM_L2, k] = _ZERO
    for i in range(_SIZE):
        for k in range(LANES):
            x, peak = grid[i, k], state[PEAK, k]
            above = np.int32(-np.int32(abs(x) > abs(peak)))  # never of NaN
            state[PEAK, k] = select(above, x, peak)
    for k in range(LANES):
        state[SCALE, k] = np.float32(np.float32(-half) / state[PEAK, k])
    for i in range(_SIZE):
        for k in range(LANES):
            x = grid[i, k]
            square = np.float32(x * x)
            cube = np.float32(square * x)
            level = _round(np.float32(state[SCALE, k] * x), half)
            grid[_SIZE + i, k] = square
            grid[_CUBE + i, k] = cube
            grid[LEVEL + i, k] = level
            state[_SUM_LX, k] += np.float32(cube * level)
            state[_SUM_L2, k] += np.float32(np.float32(square * level) * level)


@inlined
def _fit(state: Float32) -> None:
    for k in range(LANES):
        sum_lx, sum_l2 = state[_SUM_LX, k], state[_SUM_L2, k]
        fit = np.float32(sum_lx / sum_l2)
        held = np.int32(sum_l2 > _ZERO) & np.int32(abs(state[PEAK, k]) >= GROUP_MAX_EPS)
        state[SCALE, k] = select(np.int32(-np.int32(held)), fit, _ZERO)


@kernel
def settle(grid: Float32, state: Float32, half: np.int32) -> None:
    """Fit the first levels, and tell which sub-blocks certainly keep them.

    An element keeps its level where the quotient that the search rounds lies within 0.4999 of it,
    or beyond it at an end of the range. Compared after multiplying by the divisor, strictly, so
    that no rounding, of subnormal numbers either, makes a near quotient of one that is not.

    Args:
        grid: (GRID_ROWS, LANES), elements in rows 0-15; the rest is scratch.
        state: (STATE_ROWS, LANES), scratch; on return SCALE and PEAK hold where MOVES is 0.
        half: the level of zero.
    """
    _start(grid, state, half)
    least, most = np.float32(-half), np.float32(np.float32(half) - _ONE)
    for k in range(LANES):
        state[MOVES, k] = _ZERO
    for i in range(_SIZE):
        for k in range(LANES):
            level = grid[LEVEL + i, k]
            weighted = np.float32(grid[_SIZE + i, k] * level)
            rest_lx = np.float32(state[_SUM_LX, k] - np.float32(grid[_CUBE + i, k] * level))
            rest_l2 = np.float32(state[_SUM_L2, k] - np.float32(weighted * level))
            off = np.float32(np.float32(grid[i, k] * rest_l2) - np.float32(level * rest_lx))
            near = np.float32(_NEAR * rest_lx)
            kept = np.int32(off < near) | np.int32(level == most)
            kept &= np.int32(off > -near) | np.int32(level == least)
            kept |= np.int32(rest_lx <= _ZERO)
            state[MOVES, k] += np.float32(np.int32(np.int32(1) - kept))
    _fit(state)


@kernel
def descend(grid: Float32, state: Float32, half: np.int32) -> None:
    """Search all lanes; see descent_search.descent_search for the method.

    Args:
        grid: (GRID_ROWS, LANES), elements in rows 0-15; on return levels from row LEVEL on, less
            `half`; the rest is scratch.
        state: (STATE_ROWS, LANES), scratch; on return SCALE and PEAK hold.
        half: the level of zero.
    """
    _start(grid, state, half)
    for _ in range(ROUNDS):
        for k in range(LANES):
            state[MOVES, k] = _ZERO
        for i in range(_SIZE):
            for k in range(LANES):
                level = grid[LEVEL + i, k]
                sum_lx, sum_l2 = state[_SUM_LX, k], state[_SUM_L2, k]
                square, cube = grid[_SIZE + i, k], grid[_CUBE + i, k]
                rest_lx = np.float32(sum_lx - np.float32(cube * level))
                rest_l2 = np.float32(sum_l2 - np.float32(np.float32(square * level) * level))
                trial = _round(np.float32(np.float32(grid[i, k] * rest_l2) / rest_lx), half)
                trial_lx = np.float32(rest_lx + np.float32(cube * trial))
                trial_l2 = np.float32(rest_l2 + np.float32(np.float32(square * trial) * trial))
                gain = np.float32(np.float32(trial_lx * trial_lx) * sum_l2)
                gain_mask = np.int32(gain > np.float32(np.float32(sum_lx * sum_lx) * trial_l2))
                moves = gain_mask & np.int32(rest_lx > _ZERO) & np.int32(trial != level)
                moves &= np.int32(trial_l2 > _ZERO)
                mask = np.int32(-np.int32(moves))
                grid[LEVEL + i, k] = select(mask, trial, level)
                state[_SUM_LX, k] = select(mask, trial_lx, sum_lx)
                state[_SUM_L2, k] = select(mask, trial_l2, sum_l2)
                state[MOVES, k] += np.float32(np.int32(moves))
        total = _ZERO
        for k in range(LANES):
            total += state[MOVES, k]
        if total == _ZERO:
            break
    _fit(state)
