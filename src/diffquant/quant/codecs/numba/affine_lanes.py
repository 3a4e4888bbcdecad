"""affine_search.affine_search for 64 sub-blocks side by side: one lane of a vector each.

The search is a chain of dependent steps on 16 or 32 elements, slow one block at a time. Laid out
as a structure of arrays, every step is one vector instruction over lanes, and each lane still adds
its elements in the reference's order. Four elements are taken per sweep over the lanes, so sums
travel through memory a quarter as often. All state stands in two arrays: with more, the compiler
would have to check too many pairs for overlap and would give vectors up.

    grid  rows 0 to size - 1 elements, size to 2 * size - 1 their weights
    state one row per quantity, named below

`load` fills the elements; one of the functions of affine_weights.py fills the weights.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.numba.compile import inlined, merged
from diffquant.quant.codecs.numba.floats import nearest_int, select
from diffquant.quant.codecs.numba.lanes import LANES

__all__ = [
    "FIT_ISCALE",
    "FIT_LOW",
    "GRID_ROWS",
    "LOW",
    "SCALE",
    "SIGMA",
    "STATE_ROWS",
    "SUM_W",
    "load",
    "search",
    "take_levels",
]

GRID_ROWS = 64
STATE_ROWS = 14
SCALE = 0  # best so far; 0 for a flat sub-block
LOW = 1  # its minimum, not above 0; where the next candidate starts
FIT_ISCALE = 2  # levels of the best candidate: nearest_int(FIT_ISCALE * (x - FIT_LOW))
FIT_LOW = 3
SUM_W = 6
SIGMA = 8  # scratch of the functions that fill the weights
_HIGH = 4
_ERROR = 5
_SUM_X = 7
_ISCALE = 8
_SUM_L = 9
_SUM_L2 = 10
_SUM_XL = 11
_TRIAL_SCALE = 12
_TRIAL_LOW = 13
_TRIAL_ERROR = 9  # shares a row with _SUM_L, which is done by then
_ZERO = np.float32(0)
_ONE = np.float32(1)


@inlined
def load(rows: Float32, start: int, count: int, grid: Float32) -> None:
    """Spread rows `start` and on of (B, size), `count` sub-blocks, to lanes; others get zeros."""
    size = rows.shape[1]
    for lane in range(LANES):
        if lane < count:
            for i in range(size):
                grid[i, lane] = rows[start + lane, i]
        else:
            for i in range(size):
                grid[i, lane] = _ZERO


@inlined
def _level(x: np.float32, iscale: np.float32, low: np.float32, top: np.int32) -> np.float32:
    level = nearest_int(np.float32(iscale * np.float32(x - low)))
    level = level if level > np.int32(0) else np.int32(0)
    return np.float32(level if level < top else top)


@merged
def _prepare(grid: Float32, state: Float32, size: int) -> None:
    for k in range(LANES):
        x, w = grid[0, k], grid[size, k]
        state[LOW, k] = x
        state[_HIGH, k] = x
        state[SUM_W, k] = w
        state[_SUM_X, k] = np.float32(w * x)
    for i in range(1, size):
        for k in range(LANES):
            x, w, low, high = grid[i, k], grid[size + i, k], state[LOW, k], state[_HIGH, k]
            state[LOW, k] = x if x < low else low
            state[_HIGH, k] = x if x > high else high
            state[SUM_W, k] += w
            state[_SUM_X, k] += np.float32(w * x)


@merged
def _start(state: Float32, top: np.int32) -> None:
    # The first trial is the plain grid from the minimum to the largest element.
    for k in range(LANES):
        low = state[LOW, k]
        low = _ZERO if low > _ZERO else low
        iscale = np.float32(np.float32(top) / np.float32(state[_HIGH, k] - low))
        scale = np.float32(_ONE / iscale)
        state[LOW, k] = low
        state[SCALE, k] = scale
        state[FIT_ISCALE, k] = iscale
        state[FIT_LOW, k] = low
        state[_ISCALE, k] = iscale
        state[_TRIAL_SCALE, k] = scale
        state[_TRIAL_LOW, k] = low
        state[_TRIAL_ERROR, k] = _ZERO


@merged
def _sum_levels(
    grid: Float32, state: Float32, size: int, top: np.int32, intervals: np.float32
) -> None:
    for k in range(LANES):
        state[_ISCALE, k] = np.float32(intervals / np.float32(state[_HIGH, k] - state[LOW, k]))
        state[_SUM_L, k] = _ZERO
        state[_SUM_L2, k] = _ZERO
        state[_SUM_XL, k] = _ZERO
    for i in range(0, size, 4):
        for k in range(LANES):
            iscale, low = state[_ISCALE, k], state[LOW, k]
            sum_l, sum_l2, sum_xl = state[_SUM_L, k], state[_SUM_L2, k], state[_SUM_XL, k]
            for j in range(4):
                x = grid[i + j, k]
                level = _level(x, iscale, low, top)
                weighted = np.float32(grid[size + i + j, k] * level)
                sum_l = np.float32(sum_l + weighted)
                sum_l2 = np.float32(sum_l2 + np.float32(weighted * level))
                sum_xl = np.float32(sum_xl + np.float32(weighted * x))
            state[_SUM_L, k] = sum_l
            state[_SUM_L2, k] = sum_l2
            state[_SUM_XL, k] = sum_xl


@merged
def _fit(state: Float32) -> None:
    # Weighted least squares of x against levels; a minimum above 0 is refitted through 0.
    for k in range(LANES):
        sum_w, sum_x = state[SUM_W, k], state[_SUM_X, k]
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
def _difference(grid: Float32, state: Float32, row: int, k: int, top: np.int32) -> np.float32:
    # Levels are computed again: stored by the first sweep, they would cost it its vectors.
    x = grid[row, k]
    level = _level(x, state[_ISCALE, k], state[LOW, k], top)
    fit = np.float32(np.float32(state[_TRIAL_SCALE, k] * level) + state[_TRIAL_LOW, k])
    return np.float32(fit - x)


@merged
def _sum_squares(grid: Float32, state: Float32, size: int, top: np.int32) -> None:
    for i in range(0, size, 4):
        for k in range(LANES):
            error = state[_TRIAL_ERROR, k]
            for j in range(4):
                diff = _difference(grid, state, i + j, k, top)
                error = np.float32(error + grid[size + i + j, k] * np.float32(diff * diff))
            state[_TRIAL_ERROR, k] = error


@merged
def _sum_absolutes(grid: Float32, state: Float32, size: int, top: np.int32) -> None:
    for i in range(0, size, 4):
        for k in range(LANES):
            error = state[_TRIAL_ERROR, k]
            for j in range(4):
                diff = _difference(grid, state, i + j, k, top)
                error = np.float32(error + grid[size + i + j, k] * np.float32(abs(diff)))
            state[_TRIAL_ERROR, k] = error


@merged
def _keep_better(state: Float32) -> None:
    for k in range(LANES):
        better = np.int32(-np.int32(state[_TRIAL_ERROR, k] < state[_ERROR, k]))
        state[FIT_ISCALE, k] = select(better, state[_ISCALE, k], state[FIT_ISCALE, k])
        state[FIT_LOW, k] = select(better, state[LOW, k], state[FIT_LOW, k])
        state[_ERROR, k] = select(better, state[_TRIAL_ERROR, k], state[_ERROR, k])
        state[SCALE, k] = select(better, state[_TRIAL_SCALE, k], state[SCALE, k])
        state[LOW, k] = select(better, state[_TRIAL_LOW, k], state[LOW, k])


@inlined
def search(
    grid: Float32,
    state: Float32,
    size: int,
    top: np.int32,
    first: np.float32,
    step: np.float32,
    steps: int,
    absolute: bool,
) -> None:
    """Search all lanes; see affine_search.affine_search for the method.

    Args:
        grid: (GRID_ROWS, LANES), elements and weights.
        state: (STATE_ROWS, LANES), scratch; on return SCALE, LOW, SUM_W, FIT_ISCALE and FIT_LOW
            hold.
        size: elements of a sub-block, 16 or 32.
        top: largest level.
        first: intervals to add to `top` in the first candidate.
        step: what each further candidate adds.
        steps: candidates after the first.
        absolute: compare fits by absolute instead of squared errors.
    """
    _prepare(grid, state, size)
    for trial in range(-1, steps + 1):
        if trial < 0:
            _start(state, top)
        else:
            offset = np.float32(first + np.float32(step * np.float32(trial)))
            _sum_levels(grid, state, size, top, np.float32(offset + np.float32(top)))
            _fit(state)
        if absolute:
            _sum_absolutes(grid, state, size, top)
        else:
            _sum_squares(grid, state, size, top)
        if trial < 0:
            for k in range(LANES):
                state[_ERROR, k] = state[_TRIAL_ERROR, k]
        else:
            _keep_better(state)
    for k in range(LANES):
        # A flat sub-block divided by zero above: FIT_ISCALE is infinite, nothing else can be.
        low = state[FIT_LOW, k]
        if state[_HIGH, k] == low:
            state[SCALE, k] = _ZERO
            state[LOW, k] = low
            state[FIT_ISCALE, k] = _ZERO


@inlined
def take_levels(grid: Float32, state: Float32, size: int, top: np.int32, level: Bytes) -> None:
    """Take the levels that the search found: (size, LANES)."""
    for i in range(size):
        for k in range(LANES):
            found = _level(grid[i, k], state[FIT_ISCALE, k], state[FIT_LOW, k], top)
            level[i, k] = np.uint8(np.int32(found))
