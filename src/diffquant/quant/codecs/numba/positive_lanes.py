"""affine_search.positive_search for 16 super-blocks side by side; affine_lanes.py says why and how.

A lane holds the scales or the minima of one super-block, 8 or 16 values.

    grid  rows 0-15 values, 16-31 their weights, 32-47 levels as floats, then one row per quantity
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32
from diffquant.quant.codecs.numba.compile import inlined, merged
from diffquant.quant.codecs.numba.floats import nearest_int, select
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS

__all__ = ["LEVEL", "POSITIVE_LANES", "SCALE", "WEIGHT", "scratch", "search"]

POSITIVE_LANES = 16
WEIGHT = 16  # first row of the weights
LEVEL = 32  # first row of the levels, in 0..255
SCALE = 48
_MOST = 49
_ISCALE = 50
_ERROR = 51
_TRIAL = 52
_TRIAL_SCALE = 53
_TRIAL_ERROR = 54
_SUM_LX = 55
_SUM_L2 = 56
_CHANGED = 57
_ROWS = 58
_ZERO = np.float32(0)
_ONE = np.float32(1)
_STEP = np.float32(0.1)
_BYTE = np.int32(255)


def scratch() -> Float32:
    """Allocate a grid: lanes that are never filled hold zeros."""
    return np.zeros((_ROWS, POSITIVE_LANES), np.float32)


@inlined
def _sum_error(grid: Float32, count: int, limit: np.int32, mask: np.int32) -> None:
    for k in range(POSITIVE_LANES):
        grid[_TRIAL_SCALE, k] = np.float32(_ONE / grid[_TRIAL, k])
        grid[_TRIAL_ERROR, k] = _ZERO
    for i in range(count):
        for k in range(POSITIVE_LANES):
            x = grid[i, k]
            integer = nearest_int(np.float32(grid[_TRIAL, k] * x))
            integer = np.int32((integer if integer < limit else limit) & mask)
            diff = np.float32(x - np.float32(grid[_TRIAL_SCALE, k] * np.float32(integer)))
            term = np.float32(np.float32(grid[WEIGHT + i, k] * diff) * diff)
            grid[_TRIAL_ERROR, k] += term


@merged
def _choose_grid(grid: Float32, count: int, top: np.int32) -> None:
    for k in range(POSITIVE_LANES):
        grid[_MOST, k] = _ZERO
    for i in range(count):
        for k in range(POSITIVE_LANES):
            x, most = grid[i, k], grid[_MOST, k]
            grid[_MOST, k] = x if x > most else most
    for trial in range(-5, 5):  # -5 stands for the first, plain one, which is not repeated at 0
        if trial == 0:
            continue
        step = trial if trial > -5 else 0
        intervals = np.float32(np.float32(_STEP * np.float32(step)) + np.float32(top))
        for k in range(POSITIVE_LANES):
            grid[_TRIAL, k] = np.float32(intervals / grid[_MOST, k])
        if trial == -5:
            _sum_error(grid, count, np.int32(2**23), _BYTE)  # C keeps these levels in bytes
            for k in range(POSITIVE_LANES):
                grid[_ISCALE, k] = grid[_TRIAL, k]
                grid[_ERROR, k] = grid[_TRIAL_ERROR, k]
            continue
        _sum_error(grid, count, top, np.int32(-1))
        for k in range(POSITIVE_LANES):
            better = np.int32(-np.int32(grid[_TRIAL_ERROR, k] < grid[_ERROR, k]))
            grid[_ISCALE, k] = select(better, grid[_TRIAL, k], grid[_ISCALE, k])
            grid[_ERROR, k] = select(better, grid[_TRIAL_ERROR, k], grid[_ERROR, k])


@merged
def _fit(grid: Float32, count: int, top: np.int32) -> None:
    for k in range(POSITIVE_LANES):
        grid[_SUM_LX, k] = _ZERO
        grid[_SUM_L2, k] = _ZERO
    for i in range(count):
        for k in range(POSITIVE_LANES):
            x, w = grid[i, k], grid[WEIGHT + i, k]
            integer = nearest_int(np.float32(grid[_ISCALE, k] * x))
            integer = integer if integer < top else top
            level = np.float32(integer)
            grid[_SUM_LX, k] += np.float32(np.float32(w * x) * level)
            grid[_SUM_L2, k] += np.float32(np.float32(w * level) * level)
            grid[LEVEL + i, k] = np.float32(np.int32(integer & _BYTE))


@merged
def _move(grid: Float32, count: int, top: np.int32) -> None:
    # Move each level in turn to where the fit of the others wants it.
    for i in range(count):
        for k in range(POSITIVE_LANES):
            x, w, level = grid[i, k], grid[WEIGHT + i, k], grid[LEVEL + i, k]
            sum_lx, sum_l2 = grid[_SUM_LX, k], grid[_SUM_L2, k]
            wx = np.float32(w * x)
            rest_lx = np.float32(sum_lx - np.float32(wx * level))
            rest_l2 = np.float32(sum_l2 - np.float32(np.float32(w * level) * level))
            integer = nearest_int(np.float32(np.float32(x * rest_l2) / rest_lx))
            integer = integer if integer < top else top
            to = np.float32(integer)
            trial_lx = np.float32(rest_lx + np.float32(wx * to))
            trial_l2 = np.float32(rest_l2 + np.float32(np.float32(w * to) * to))
            gain = np.float32(np.float32(trial_lx * trial_lx) * sum_l2) > np.float32(
                np.float32(sum_lx * sum_lx) * trial_l2
            )
            able = np.int32(np.int32(rest_lx > _ZERO) & np.int32(rest_l2 > _ZERO))
            able = np.int32(able & np.int32(np.int32(to != level) & np.int32(gain)))
            better = np.int32(-able)
            kept = np.float32(np.int32(integer & _BYTE))
            grid[LEVEL + i, k] = select(better, kept, level)
            grid[_SUM_LX, k] = select(better, trial_lx, sum_lx)
            grid[_SUM_L2, k] = select(better, trial_l2, sum_l2)
            grid[_CHANGED, k] = select(better, _ONE, grid[_CHANGED, k])


@inlined
def search(grid: Float32, count: int, top: np.int32) -> None:
    """Search all lanes; see affine_search.positive_search for the method.

    Args:
        grid: from `scratch`, values and weights filled in; on return SCALE and the levels hold.
        count: values of a lane.
        top: largest level.
    """
    _choose_grid(grid, count, top)
    _fit(grid, count, top)
    for _ in range(5):
        for k in range(POSITIVE_LANES):
            grid[_CHANGED, k] = _ZERO
        _move(grid, count, top)
        changed = False
        for k in range(POSITIVE_LANES):
            changed |= grid[_CHANGED, k] != _ZERO
        if not changed:
            break
    for k in range(POSITIVE_LANES):
        sum_l2 = grid[_SUM_L2, k]
        scale = np.float32(grid[_SUM_LX, k] / sum_l2)
        kept = np.int32(-np.int32(grid[_MOST, k] >= GROUP_MAX_EPS))
        fitted = np.int32(-np.int32(sum_l2 > _ZERO))
        grid[SCALE, k] = select(np.int32(kept & fitted), scale, _ZERO)
        for i in range(count):
            grid[LEVEL + i, k] = select(kept, grid[LEVEL + i, k], _ZERO)
