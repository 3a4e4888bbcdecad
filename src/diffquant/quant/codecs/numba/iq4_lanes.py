"""iq4_search.find_scale for 64 sub-blocks side by side; affine_lanes.py says why and how.

Blocks have one sub-block (IQ4_NL) or eight (IQ4_XS). Lane `batch * j + b` holds sub-block j of
block b, so that a sum over a whole block runs side by side as well.

    grid  rows 0-31 elements x, 32-63 weights of their squared errors
    state one row per quantity, named below
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.iq4_search import MIDPOINTS, STEPS, VALUES
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits, select
from diffquant.quant.codecs.numba.lanes import LANES
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS

__all__ = ["GRID_ROWS", "INVERSE", "NIBBLE_ROWS", "SCALE", "STATE_ROWS", "load", "pack", "search"]

GRID_ROWS = 64
STATE_ROWS = 7
NIBBLE_ROWS = 16
SCALE = 0  # best so far, of either sign
INVERSE = 1  # what `pack` multiplies elements with
_PEAK = 2  # first element of largest magnitude
_ISCALE = 3
_BEST = 4
_SUM_QX = 5
_SUM_Q2 = 6
_POWER = 5  # mean squares, needed before the sums
_SIZE = 32
_ZERO = np.float32(0)
_ONE = np.float32(1)
_LOWEST = VALUES[0]
_BOUNDS = tuple(MIDPOINTS)
_VALUES = tuple(VALUES)
_LEVELS = tuple(np.arange(16, dtype=np.float32))


@inlined
def _nearest(scaled: np.float32, table: tuple[np.float32, ...]) -> np.float32:
    """Look the nearest level up in a table of its values or of its index."""
    # Written out: a loop over the bounds is not unrolled before vectors are looked for, and costs
    # thirty times as much. A gather from a table over twice the number costs 1.6 times.
    found = table[0]
    found = found if scaled < _BOUNDS[0] else table[1]
    found = found if scaled < _BOUNDS[1] else table[2]
    found = found if scaled < _BOUNDS[2] else table[3]
    found = found if scaled < _BOUNDS[3] else table[4]
    found = found if scaled < _BOUNDS[4] else table[5]
    found = found if scaled < _BOUNDS[5] else table[6]
    found = found if scaled < _BOUNDS[6] else table[7]
    found = found if scaled < _BOUNDS[7] else table[8]
    found = found if scaled < _BOUNDS[8] else table[9]
    found = found if scaled < _BOUNDS[9] else table[10]
    found = found if scaled < _BOUNDS[10] else table[11]
    found = found if scaled < _BOUNDS[11] else table[12]
    found = found if scaled < _BOUNDS[12] else table[13]
    found = found if scaled < _BOUNDS[13] else table[14]
    found = found if scaled < _BOUNDS[14] else table[15]
    return found


@inlined
def _lay_out(blocks: Float32, start: int, count: int, period: int, grid: Float32, row: int) -> None:
    # Blocks `start` and on, which repeat after `period`; lanes beyond the last block are zero.
    subs = blocks.shape[1] // _SIZE
    batch = LANES // subs
    for b in range(batch):
        block = (start + b) % period
        for j in range(subs):
            for i in range(_SIZE):
                element = blocks[block, _SIZE * j + i] if b < count else _ZERO
                grid[row + i, batch * j + b] = element


@inlined
def _weigh(grid: Float32, state: Float32, subs: int) -> None:
    """Multiply importance by sqrt(twice the block's mean square + x squared)."""
    batch = LANES // subs
    factor = np.float32(np.float32(2) / np.float32(_SIZE * subs))
    for k in range(LANES):
        state[_POWER, k] = _ZERO
    for j in range(subs):
        for i in range(_SIZE):
            for b in range(batch):
                x = grid[i, batch * j + b]
                state[_POWER, b] += np.float32(x * x)
    for b in range(batch):
        power = np.float32(state[_POWER, b] * factor)
        for j in range(subs):
            state[_POWER, batch * j + b] = power
    for i in range(_SIZE):
        for k in range(LANES):
            x = grid[i, k]
            spread = np.sqrt(np.float32(state[_POWER, k] + np.float32(x * x)))
            grid[_SIZE + i, k] *= np.float32(spread)


@kernel
def load(
    weight: Float32, start: int, count: int, importance: Float32, grid: Float32, state: Float32
) -> None:
    """Fill the grid with `count` blocks and the weights of their elements.

    Args:
        weight: (B, 32) or (B, 256).
        start: first block.
        count: blocks to take, at most LANES sub-blocks.
        importance: (K / block size, block size), or (0, block size) for the mode without.
        grid: (GRID_ROWS, LANES).
        state: (STATE_ROWS, LANES), scratch.
    """
    _lay_out(weight, start, count, weight.shape[0] + LANES, grid, 0)
    if importance.shape[0]:
        _lay_out(importance, start, count, importance.shape[0], grid, _SIZE)
        _weigh(grid, state, weight.shape[1] // _SIZE)
    else:
        for i in range(_SIZE):
            for k in range(LANES):
                grid[_SIZE + i, k] = np.float32(grid[i, k] * grid[i, k])


@inlined
def _find_peak(grid: Float32, state: Float32) -> None:
    for k in range(LANES):
        state[_PEAK, k] = _ZERO
    for i in range(_SIZE):
        for k in range(LANES):
            x, peak = grid[i, k], state[_PEAK, k]
            above = np.int32(-np.int32(magnitude_bits(x) > magnitude_bits(peak)))
            state[_PEAK, k] = select(above, x, peak)


@inlined
def _sum_values(grid: Float32, state: Float32) -> None:
    for k in range(LANES):
        state[_SUM_QX, k] = _ZERO
        state[_SUM_Q2, k] = _ZERO
    for i in range(0, _SIZE, 4):
        for k in range(LANES):
            iscale = state[_ISCALE, k]
            sum_qx, sum_q2 = state[_SUM_QX, k], state[_SUM_Q2, k]
            for j in range(4):
                x = grid[i + j, k]
                value = _nearest(np.float32(iscale * x), _VALUES)
                weighted = np.float32(grid[_SIZE + i + j, k] * value)
                sum_qx = np.float32(sum_qx + np.float32(weighted * x))
                sum_q2 = np.float32(sum_q2 + np.float32(weighted * value))
            state[_SUM_QX, k] = sum_qx
            state[_SUM_Q2, k] = sum_q2


@inlined
def _keep_first(state: Float32) -> None:
    for k in range(LANES):
        sum_qx, sum_q2 = state[_SUM_QX, k], state[_SUM_Q2, k]
        scale = np.float32(sum_qx / sum_q2) if sum_q2 > _ZERO else _ZERO
        state[SCALE, k] = scale
        state[_BEST, k] = np.float32(scale * sum_qx)


@inlined
def _keep_better(state: Float32) -> None:
    for k in range(LANES):
        sum_qx, sum_q2 = state[_SUM_QX, k], state[_SUM_Q2, k]
        fit = np.float32(sum_qx / sum_q2)
        gain = np.float32(sum_qx * sum_qx) > np.float32(state[_BEST, k] * sum_q2)
        better = np.int32(-np.int32(np.int32(sum_q2 > _ZERO) & np.int32(gain)))
        state[SCALE, k] = select(better, fit, state[SCALE, k])
        state[_BEST, k] = select(better, np.float32(fit * sum_qx), state[_BEST, k])


@kernel
def search(grid: Float32, state: Float32) -> None:
    """Search all lanes; see iq4_search.find_scale for the method.

    Args:
        grid: (GRID_ROWS, LANES), as `load` fills it.
        state: (STATE_ROWS, LANES), scratch; on return SCALE holds.
    """
    _find_peak(grid, state)
    for step in range(-STEPS - 1, STEPS + 1):
        first = step < -STEPS
        for k in range(LANES):
            peak = state[_PEAK, k]
            if first:  # equal in real numbers to the middle candidate, not in float32
                state[_ISCALE, k] = np.float32(_ONE / np.float32(np.float32(-peak) / _LOWEST))
            else:
                state[_ISCALE, k] = np.float32(np.float32(np.float32(step) + _LOWEST) / peak)
        _sum_values(grid, state)
        if first:
            _keep_first(state)
        else:
            _keep_better(state)
    for k in range(LANES):
        if abs(state[_PEAK, k]) < GROUP_MAX_EPS:
            state[SCALE, k] = _ZERO


@kernel
def pack(grid: Float32, state: Float32, nibbles: Bytes) -> None:
    """Write the nearest levels of INVERSE * x as nibbles, (NIBBLE_ROWS, LANES)."""
    for i in range(NIBBLE_ROWS):
        for k in range(LANES):
            low = _nearest(np.float32(state[INVERSE, k] * grid[i, k]), _LEVELS)
            high = _nearest(np.float32(state[INVERSE, k] * grid[NIBBLE_ROWS + i, k]), _LEVELS)
            byte = np.int32(np.int32(low) | np.int32(np.int32(high) << np.int32(4)))
            nibbles[i, k] = np.uint8(byte)
