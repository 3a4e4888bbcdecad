"""Device function: codecs/affine_search.py's positive search, one super-block in each lane.

Its elements are the scales or minima of the super-block's sub-blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffquant.quant.codecs.triton.numbers import nearest_int

__all__ = ["positive_search"]


@triton.jit
def _error(x, weight, factor, TOP: tl.constexpr, FIRST: tl.constexpr):
    scale = tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor)
    total = tl.zeros_like(factor)
    for i in tl.static_range(len(x)):
        level = nearest_int(factor * x[i])
        level = level & 255 if FIRST else tl.minimum(level, TOP)
        diff = x[i] - scale * level.to(tl.float32)
        total = total + weight[i] * diff * diff
    return total


@triton.jit
def _sweep(x, weight, levels, sum_lx, sum_l2, TOP: tl.constexpr):
    """Each level in turn moves to where the fit of the others wants it, if that helps."""
    found = ()
    for i in tl.static_range(len(x)):
        wx, level = weight[i] * x[i], levels[i].to(tl.float32)
        rest_lx, rest_l2 = sum_lx - wx * level, sum_l2 - weight[i] * level * level
        possible = (rest_lx > 0.0) & (rest_l2 > 0.0)
        wanted = tl.div_rn(x[i] * rest_l2, tl.where(possible, rest_lx, 1.0))
        moved = tl.minimum(nearest_int(wanted), TOP)
        to = moved.to(tl.float32)
        trial_lx, trial_l2 = rest_lx + wx * to, rest_l2 + weight[i] * to * to
        gain = trial_lx * trial_lx * sum_l2 > sum_lx * sum_lx * trial_l2
        better = possible & (moved != levels[i]) & gain
        found = found + (tl.where(better, moved & 255, levels[i]),)
        sum_lx = tl.where(better, trial_lx, sum_lx)
        sum_l2 = tl.where(better, trial_l2, sum_l2)
    return found, sum_lx, sum_l2


@triton.jit
def positive_search(x, weight, grids, TOP: tl.constexpr):
    """Find one scale so that x is near `scale * level`, level in 0..TOP.

    Args:
        x: a tuple of values.
        weight: a tuple of weights of their squared errors.
        grids: (9,) float32, intervals of the candidates; the first is the plain one, TOP.
        TOP: largest level.

    Returns:
        scale, and a tuple of levels in bytes (a negative one wraps as in C), all 0 where no value
        reaches 1e-15 (GROUP_MAX_EPS).
    """
    most = tl.zeros_like(x[0])
    for i in tl.static_range(len(x)):
        most = tl.maximum(most, x[i])
    empty = most < 1e-15
    most = tl.where(empty, 1.0, most)  # nothing comes of it
    best = tl.div_rn(tl.zeros_like(most) + tl.load(grids), most)
    error = _error(x, weight, best, TOP, True)
    for at in range(1, 9):
        factor = tl.div_rn(tl.zeros_like(most) + tl.load(grids + at), most)
        trial = _error(x, weight, factor, TOP, False)
        better = trial < error
        error = tl.where(better, trial, error)
        best = tl.where(better, factor, best)
    levels, sum_lx, sum_l2 = (), tl.zeros_like(most), tl.zeros_like(most)
    for i in tl.static_range(len(x)):
        whole = tl.minimum(nearest_int(best * x[i]), TOP)
        level = whole.to(tl.float32)
        sum_lx = sum_lx + weight[i] * x[i] * level
        sum_l2 = sum_l2 + weight[i] * level * level
        levels = levels + (whole & 255,)
    for _ in range(5):
        levels, sum_lx, sum_l2 = _sweep(x, weight, levels, sum_lx, sum_l2, TOP)
    fitted = (sum_l2 > 0.0) & (most >= 1e-15)
    scale = tl.where(fitted, tl.div_rn(sum_lx, sum_l2), 0.0)
    found = ()
    for i in tl.static_range(len(x)):
        found = found + (tl.where(empty, 0, levels[i]),)
    return tl.where(empty, 0.0, scale), found
