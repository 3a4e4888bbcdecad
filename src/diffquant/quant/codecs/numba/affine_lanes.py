"""scale_search.affine_search for 64 sub-blocks side by side: one lane of a vector each.

The search is a chain of dependent steps on 32 elements, slow one block at a time. Laid out as a
structure of arrays, every step is one vector instruction over lanes, and each lane still adds its
elements in the reference's order. Four elements are taken per sweep over the lanes, so sums
travel through memory a quarter as often. All state stands in two arrays: with more, the compiler
would have to check too many pairs for overlap and would give vectors up.

    grid  rows 0-31 elements, 32-63 their weights
    state one row per quantity, named below
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import nearest_int, select
from diffquant.quant.codecs.numba.lanes import LANES

__all__ = ["FIT_ISCALE", "FIT_LOW", "GRID_ROWS", "LOW", "SCALE", "STATE_ROWS", "search"]

GRID_ROWS = 64
STATE_ROWS = 14
SCALE = 0  # best so far; 0 for a flat sub-block
LOW = 1  # its minimum, not above 0; where the next candidate starts
FIT_ISCALE = 2  # levels of the best candidate: nearest_int(FIT_ISCALE * (x - FIT_LOW))
FIT_LOW = 3
_HIGH = 4
_ERROR = 5
_SUM_W = 6
_SUM_X = 7
_ISCALE = 8
_SUM_L = 9
_SUM_L2 = 10
_SUM_XL = 11
_TRIAL_SCALE = 12
_TRIAL_LOW = 13
_TRIAL_ERROR = 9  # shares a row with _SUM_L, which is done by then
_SIZE = 32
_ZERO = np.float32(0)
_ONE = np.float32(1)
_STEP = np.float32(0.1)
_COUNT = np.float32(32)


@inlined
def _level(x: np.float32, iscale: np.float32, low: np.float32, top: np.int32) -> np.float32:
    level = nearest_int(np.float32(iscale * np.float32(x - low)))
    level = level if level > np.int32(0) else np.int32(0)
    return np.float32(level if level < top else top)


@inlined
def _term(
    x: np.float32, w: np.float32, level: np.float32, scale: np.float32, low: np.float32
) -> np.float32:
    diff = np.float32(np.float32(np.float32(scale * level) + low) - x)
    return np.float32(w * np.float32(diff * diff))


@inlined
def _prepare(grid: Float32, state: Float32) -> None:
    # Weights are the root mean square plus the magnitude.
    for k in range(LANES):
        state[_ISCALE, k] = _ZERO
        state[LOW, k] = grid[0, k]
        state[_HIGH, k] = grid[0, k]
        state[_SUM_W, k] = _ZERO
        state[_SUM_X, k] = _ZERO
        state[_ERROR, k] = _ZERO
    for i in range(0, _SIZE, 4):
        for k in range(LANES):
            square, low, high = state[_ISCALE, k], state[LOW, k], state[_HIGH, k]
            for j in range(4):
                x = grid[i + j, k]
                square = np.float32(square + np.float32(x * x))
                low = x if x < low else low
                high = x if x > high else high
            state[_ISCALE, k] = square
            state[LOW, k] = low
            state[_HIGH, k] = high
    for k in range(LANES):
        state[_ISCALE, k] = np.sqrt(np.float32(state[_ISCALE, k] / _COUNT))
    for i in range(_SIZE):
        for k in range(LANES):
            x = grid[i, k]
            w = np.float32(state[_ISCALE, k] + abs(x))
            grid[_SIZE + i, k] = w
            state[_SUM_W, k] += w
            state[_SUM_X, k] += np.float32(w * x)


@inlined
def _start(grid: Float32, state: Float32, top: np.int32) -> None:
    # The first fit is the plain grid from the minimum to the largest element.
    for k in range(LANES):
        low = state[LOW, k]
        low = _ZERO if low > _ZERO else low
        iscale = np.float32(np.float32(top) / np.float32(state[_HIGH, k] - low))
        state[LOW, k] = low
        state[SCALE, k] = np.float32(_ONE / iscale)
        state[FIT_LOW, k] = low
        state[FIT_ISCALE, k] = iscale
    for i in range(_SIZE):
        for k in range(LANES):
            low = state[LOW, k]
            level = _level(grid[i, k], state[FIT_ISCALE, k], low, top)
            state[_ERROR, k] += _term(grid[i, k], grid[_SIZE + i, k], level, state[SCALE, k], low)


@inlined
def _sum_levels(grid: Float32, state: Float32, top: np.int32, intervals: np.float32) -> None:
    for k in range(LANES):
        state[_ISCALE, k] = np.float32(intervals / np.float32(state[_HIGH, k] - state[LOW, k]))
        state[_SUM_L, k] = _ZERO
        state[_SUM_L2, k] = _ZERO
        state[_SUM_XL, k] = _ZERO
    for i in range(0, _SIZE, 4):
        for k in range(LANES):
            iscale, low = state[_ISCALE, k], state[LOW, k]
            sum_l, sum_l2, sum_xl = state[_SUM_L, k], state[_SUM_L2, k], state[_SUM_XL, k]
            for j in range(4):
                x = grid[i + j, k]
                level = _level(x, iscale, low, top)
                weighted = np.float32(grid[_SIZE + i + j, k] * level)
                sum_l = np.float32(sum_l + weighted)
                sum_l2 = np.float32(sum_l2 + np.float32(weighted * level))
                sum_xl = np.float32(sum_xl + np.float32(weighted * x))
            state[_SUM_L, k] = sum_l
            state[_SUM_L2, k] = sum_l2
            state[_SUM_XL, k] = sum_xl


@inlined
def _fit(state: Float32) -> None:
    # Weighted least squares of x against levels; a minimum above 0 is refitted through 0.
    for k in range(LANES):
        sum_w, sum_x = state[_SUM_W, k], state[_SUM_X, k]
        sum_l, sum_l2, sum_xl = state[_SUM_L, k], state[_SUM_L2, k], state[_SUM_XL, k]
        determinant = np.float32(np.float32(sum_w * sum_l2) - np.float32(sum_l * sum_l))
        scale = np.float32(
            np.float32(np.float32(sum_w * sum_xl) - np.float32(sum_x * sum_l)) / determinant
        )
        low = np.float32(
            np.float32(np.float32(sum_l2 * sum_x) - np.float32(sum_l * sum_xl)) / determinant
        )
        through = np.float32(sum_xl / sum_l2)
        state[_TRIAL_SCALE, k] = through if low > _ZERO else scale
        state[_TRIAL_LOW, k] = _ZERO if low > _ZERO else low
        # An error that cannot win rejects a fit whose determinant is not positive.
        state[_TRIAL_ERROR, k] = _ZERO if determinant > _ZERO else np.float32(np.inf)


@inlined
def _sum_error(grid: Float32, state: Float32, top: np.int32) -> None:
    # Levels are computed again: stored by the first sweep, they would cost it its vectors.
    for i in range(0, _SIZE, 4):
        for k in range(LANES):
            iscale, base = state[_ISCALE, k], state[LOW, k]
            scale, low = state[_TRIAL_SCALE, k], state[_TRIAL_LOW, k]
            error = state[_TRIAL_ERROR, k]
            for j in range(4):
                level = _level(grid[i + j, k], iscale, base, top)
                term = _term(grid[i + j, k], grid[_SIZE + i + j, k], level, scale, low)
                error = np.float32(error + term)
            state[_TRIAL_ERROR, k] = error


@inlined
def _keep_better(state: Float32) -> None:
    for k in range(LANES):
        better = np.int32(-np.int32(state[_TRIAL_ERROR, k] < state[_ERROR, k]))
        state[FIT_ISCALE, k] = select(better, state[_ISCALE, k], state[FIT_ISCALE, k])
        state[FIT_LOW, k] = select(better, state[LOW, k], state[FIT_LOW, k])
        state[_ERROR, k] = select(better, state[_TRIAL_ERROR, k], state[_ERROR, k])
        state[SCALE, k] = select(better, state[_TRIAL_SCALE, k], state[SCALE, k])
        state[LOW, k] = select(better, state[_TRIAL_LOW, k], state[LOW, k])


@kernel
def search(grid: Float32, state: Float32, top: np.int32, first: np.float32, steps: int) -> None:
    """Search all lanes; see scale_search.affine_search for the method.

    Args:
        grid: (GRID_ROWS, LANES), elements in rows 0-31; the rest is scratch.
        state: (STATE_ROWS, LANES), scratch; on return SCALE, LOW, FIT_ISCALE and FIT_LOW hold.
        top: largest level.
        first: intervals to add to `top` in the first candidate.
        steps: candidates after the first.
    """
    _prepare(grid, state)
    _start(grid, state, top)
    for step in range(steps + 1):
        offset = np.float32(first + np.float32(_STEP * np.float32(step)))
        _sum_levels(grid, state, top, np.float32(offset + np.float32(top)))
        _fit(state)
        _sum_error(grid, state, top)
        _keep_better(state)
    for k in range(LANES):
        # A flat sub-block divided by zero above: FIT_ISCALE is infinite, nothing else can be.
        low = state[FIT_LOW, k]
        if state[_HIGH, k] == low:
            state[SCALE, k] = _ZERO
            state[LOW, k] = low
            state[FIT_ISCALE, k] = _ZERO
