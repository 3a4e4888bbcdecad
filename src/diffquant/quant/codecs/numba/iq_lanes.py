"""iq_search.search for 64 sub-blocks side by side, except the walk over candidates.

affine_lanes.py says why lanes; here a sub-block also looks grid points up, one by one, so
the candidate scales are taken in three sweeps: combinations of levels for every scale (lanes),
their grid points (iq_nearest.py), errors for every scale (lanes). A grid point travels as its
code, a field of 3 (IQ2) or 4 bits for each level l, the first lowest, that holds 2 l + 1.

    grid   rows 0 .. size-1 magnitudes x, then their weights w, w * x, square roots of w
    state  one row per quantity, named below
    scales two rows per candidate: the inverse of its scale, its scale
    code   (candidates, groups, LANES) combinations of levels, then codes of their grid points
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32, Int32
from diffquant.quant.codecs.numba.compile import inlined
from diffquant.quant.codecs.numba.floats import nearest_int, select
from diffquant.quant.codecs.numba.lanes import LANES

__all__ = [
    "BEST_STEP",
    "LARGEST",
    "SCALE",
    "STATE_ROWS",
    "candidate_scales",
    "combine",
    "fit_scale",
    "keep_better",
    "refit",
    "scale_found",
    "split_signs",
    "sum_codes",
    "weigh",
]

SCALE = 0  # best so far, of either sign
LARGEST = 1  # the magnitude that candidates put on the highest level
SIGMA = 2  # what is added to an element's square to weigh its error
_BEST = 3
_SUM_QX = 4
_SUM_Q2 = 5
_ERROR = 6
_ISCALE = 7
_TRIAL = 8
_TRIAL_SCALE = 9
BEST_STEP = 10  # which candidate is kept, as a float; -1 none
STATE_ROWS = 11
_ZERO = np.float32(0)
_ONE = np.float32(1)
_HALF = np.float32(0.5)
_TENTH = np.float32(0.1)
_FIT_TOP = np.float32(4)
_EPS = np.float32(1e-15)


@inlined
def weigh(grid: Float32, state: Float32, size: int, weighted: bool) -> None:
    """Fill weights and their square roots.

    Rows size.. hold importance where `weighted`; SIGMA is added to the square of each element.
    """
    for i in range(size):
        for k in range(LANES):
            x = grid[i, k]
            grid[3 * size + i, k] = state[SIGMA, k] + (x * x)
        if weighted:
            for k in range(LANES):
                root = np.sqrt(grid[3 * size + i, k])
                grid[3 * size + i, k] = grid[size + i, k] * root
        for k in range(LANES):
            weight = grid[3 * size + i, k]
            grid[size + i, k] = weight
            grid[3 * size + i, k] = np.sqrt(weight)


@inlined
def split_signs(grid: Float32, state: Float32, size: int, even: bool, signs: Int32) -> None:
    """Make elements magnitudes; signs (size / 8, LANES). `even` flips the sign of least weight."""
    for eight in range(size // 8):
        for k in range(LANES):
            signs[eight, k] = np.int32(0)
            state[_ERROR, k] = np.float32(np.inf)
            state[_TRIAL, k] = _ZERO
            state[_ISCALE, k] = _ZERO
        for i in range(8):
            at = 8 * eight + i
            for k in range(LANES):
                x = grid[at, k]
                minus = np.int32(x < _ZERO)
                signs[eight, k] = np.int32(signs[eight, k] | np.int32(minus << np.int32(i)))
                grid[at, k] = abs(x)
            if even:
                for k in range(LANES):
                    x = grid[at, k]
                    loss = (grid[size + at, k] * x) * x
                    odd = np.int32(np.int32(signs[eight, k] >> np.int32(i)) & np.int32(1))
                    state[_TRIAL, k] += np.float32(odd)
                    less = np.int32(-np.int32(loss < state[_ERROR, k]))
                    state[_ERROR, k] = select(less, loss, state[_ERROR, k])
                    state[_ISCALE, k] = select(less, np.float32(i), state[_ISCALE, k])
        if even:
            for k in range(LANES):
                count = np.int32(state[_TRIAL, k])
                odd = np.int32(count & np.int32(1))
                bit = np.int32(odd << np.int32(state[_ISCALE, k]))
                signs[eight, k] = np.int32(signs[eight, k] ^ bit)
                # An index past the eight flips nothing.
                state[_ISCALE, k] = state[_ISCALE, k] if odd > np.int32(0) else np.float32(8)
            for i in range(8):
                for k in range(LANES):
                    x = grid[8 * eight + i, k]
                    flip = state[_ISCALE, k] == np.float32(i)
                    grid[8 * eight + i, k] = np.float32(-x) if flip else x
    for k in range(LANES):
        state[LARGEST, k] = grid[0, k]
    for i in range(size):
        for k in range(LANES):
            x = grid[i, k]
            state[LARGEST, k] = x if x > state[LARGEST, k] else state[LARGEST, k]
            grid[2 * size + i, k] = grid[size + i, k] * x


@inlined
def _fit_level(x: np.float32, iscale: np.float32) -> np.float32:
    level = np.float32(nearest_int(iscale * x))
    return level if level < _FIT_TOP else _FIT_TOP


@inlined
def _byte(level: np.float32) -> np.float32:
    # ggml keeps these levels in bytes, where a negative one wraps.
    return np.float32(np.int32(np.int32(level) & np.int32(255)))


@inlined
def _fit_error(grid: Float32, state: Float32, size: int, mask: np.int32, highest: np.int32) -> None:
    for k in range(LANES):
        state[_TRIAL_SCALE, k] = _ONE / state[_TRIAL, k]
        state[_SUM_QX, k] = _ZERO
    for i in range(size):
        for k in range(LANES):
            x = grid[i, k]
            whole = np.int32(nearest_int(state[_TRIAL, k] * x) & mask)
            level = np.float32(whole if whole < highest else highest)
            diff = x - (state[_TRIAL_SCALE, k] * level)
            term = (grid[size + i, k] * diff) * diff
            state[_SUM_QX, k] = state[_SUM_QX, k] + term


@inlined
def fit_scale(grid: Float32, state: Float32, size: int, level: Float32) -> None:
    """make_qp_quants: SCALE from a fit on levels 0 to 4; level (size, LANES) is scratch."""
    for k in range(LANES):
        state[_ERROR, k] = np.float32(np.inf)
        state[_ISCALE, k] = _FIT_TOP / state[LARGEST, k]
    for turn in range(9):
        # First the grid that reaches the largest element, its levels in bytes and not clamped.
        step = turn - 5 if turn < 5 else turn - 4
        intervals = _FIT_TOP if turn == 0 else (_TENTH * np.float32(step)) + _FIT_TOP
        for k in range(LANES):
            state[_TRIAL, k] = intervals / state[LARGEST, k]
        mask, highest = (np.int32(255), np.int32(255)) if turn == 0 else (np.int32(-1), np.int32(4))
        _fit_error(grid, state, size, mask, highest)
        for k in range(LANES):
            better = np.int32(-np.int32(state[_SUM_QX, k] < state[_ERROR, k]))
            state[_ERROR, k] = select(better, state[_SUM_QX, k], state[_ERROR, k])
            state[_ISCALE, k] = select(better, state[_TRIAL, k], state[_ISCALE, k])
    for k in range(LANES):
        state[_SUM_QX, k] = _ZERO
        state[_SUM_Q2, k] = _ZERO
    for i in range(size):
        for k in range(LANES):
            found = _fit_level(grid[i, k], state[_ISCALE, k])
            level[i, k] = _byte(found)
            state[_SUM_QX, k] += grid[2 * size + i, k] * found
            state[_SUM_Q2, k] += (grid[size + i, k] * found) * found
    for _ in range(5):
        for i in range(size):
            _improve_level(grid, state, size, i, level)
    for k in range(LANES):
        fit = state[_SUM_QX, k] / state[_SUM_Q2, k]
        scale = fit if state[_SUM_Q2, k] > _ZERO else _ZERO
        state[SCALE, k] = _ZERO if state[LARGEST, k] < _EPS else scale


@inlined
def _improve_level(grid: Float32, state: Float32, size: int, i: int, level: Float32) -> None:
    for k in range(LANES):
        x, w, wx, have = grid[i, k], grid[size + i, k], grid[2 * size + i, k], level[i, k]
        sum_lx, sum_l2 = state[_SUM_QX, k], state[_SUM_Q2, k]
        rest_lx = sum_lx - (wx * have)
        rest_l2 = sum_l2 - ((w * have) * have)
        wanted = _fit_level((x * rest_l2) / rest_lx, _ONE)
        new_lx = rest_lx + (wx * wanted)
        new_l2 = rest_l2 + ((w * wanted) * wanted)
        gain = (new_lx * new_lx) * sum_l2
        old = (sum_lx * sum_lx) * new_l2
        positive = np.int32(np.int32(rest_lx > _ZERO) & np.int32(rest_l2 > _ZERO))
        moves = np.int32(np.int32(wanted != have) & np.int32(gain > old))
        better = np.int32(-np.int32(positive & moves))
        level[i, k] = select(better, _byte(wanted), have)
        state[_SUM_QX, k] = select(better, new_lx, sum_lx)
        state[_SUM_Q2, k] = select(better, new_l2, sum_l2)


@inlined
def candidate_scales(
    state: Float32, scales: Float32, base: np.int32, steps: int, step: np.float32
) -> None:
    """Scales around the one that puts LARGEST on the highest level; none kept yet."""
    top = np.float32(np.int32(np.int32(2) * base - np.int32(1)))
    for n in range(2 * steps + 1):
        intervals = top + (step * np.float32(n - steps))
        for k in range(LANES):
            scales[2 * n, k] = intervals / state[LARGEST, k]
            scales[2 * n + 1, k] = _ONE / scales[2 * n, k]
    for k in range(LANES):
        state[_BEST, k] = _ZERO
        state[BEST_STEP, k] = -_ONE


@inlined
def scale_found(state: Float32, scales: Float32) -> None:
    """Make the scale found candidate 0's."""
    for k in range(LANES):
        scales[0, k] = _ONE / state[SCALE, k]
        scales[1, k] = state[SCALE, k]


@inlined
def combine(
    grid: Float32, scales: Float32, code: Int32, n: int, group: int, base: np.int32
) -> None:
    """Combinations of levels, rounded at candidate n's scale."""
    highest = np.int32(base - np.int32(1))
    for g in range(code.shape[1]):
        for k in range(LANES):
            code[n, g, k] = np.int32(0)
        for i in range(group):
            at = group * g + (group - 1 - i)  # the first level is the lowest digit
            for k in range(LANES):
                scaled = (scales[2 * n, k] * grid[at, k]) - _ONE
                level = nearest_int(_HALF * scaled)
                level = level if level > np.int32(0) else np.int32(0)
                level = level if level < highest else highest
                code[n, g, k] = np.int32(np.int32(code[n, g, k] * base) + level)


@inlined
def sum_codes(
    grid: Float32, state: Float32, size: int, code: Int32, n: int, group: int, bits: np.int32
) -> None:
    """Sums of w * x * q and w * q * q at the grid points of candidate n."""
    mask = np.int32(np.int32(np.int32(1) << bits) - np.int32(1))
    for k in range(LANES):
        state[_SUM_QX, k] = _ZERO
        state[_SUM_Q2, k] = _ZERO
    for g in range(code.shape[1]):
        for i in range(0, group, 4):
            for k in range(LANES):
                sum_qx, sum_q2 = state[_SUM_QX, k], state[_SUM_Q2, k]
                digits = np.int32(code[n, g, k] >> np.int32(bits * np.int32(i)))
                for j in range(4):
                    odd = np.int32(np.int32(digits >> np.int32(bits * np.int32(j))) & mask)
                    q, at = np.float32(odd), group * g + i + j
                    sum_qx = sum_qx + (grid[2 * size + at, k] * q)
                    square = (grid[size + at, k] * q) * q
                    sum_q2 = sum_q2 + square
                state[_SUM_QX, k] = sum_qx
                state[_SUM_Q2, k] = sum_q2


@inlined
def keep_better(state: Float32, step: int) -> None:
    """Keep the candidate whose sums were just taken, where it fits better."""
    for k in range(LANES):
        sum_qx, sum_q2 = state[_SUM_QX, k], state[_SUM_Q2, k]
        fit = sum_qx / sum_q2
        gain = sum_qx * sum_qx > state[_BEST, k] * sum_q2
        better = np.int32(-np.int32(np.int32(sum_q2 > _ZERO) & np.int32(gain)))
        state[SCALE, k] = select(better, fit, state[SCALE, k])
        state[_BEST, k] = select(better, fit * sum_qx, state[_BEST, k])
        state[BEST_STEP, k] = select(better, np.float32(step), state[BEST_STEP, k])


@inlined
def refit(state: Float32, wanted: Int32) -> None:
    """Take the least squares scale of the last sums where wanted (LANES,) is -1."""
    for k in range(LANES):
        sum_qx, sum_q2 = state[_SUM_QX, k], state[_SUM_Q2, k]
        better = np.int32(wanted[k] & np.int32(-np.int32(sum_q2 > _ZERO)))
        state[SCALE, k] = select(better, sum_qx / sum_q2, state[SCALE, k])
