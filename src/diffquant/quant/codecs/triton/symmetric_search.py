"""Device functions: codecs/scale_search.py's symmetric search, one sub-block in each lane."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["largest", "symmetric_search"]


@triton.jit
def largest(x):
    """First element of largest magnitude, sign kept; +0 for zeros."""
    peak = tl.zeros_like(x[0])
    for i in tl.static_range(len(x)):
        peak = tl.where(tl.abs(x[i]) > tl.abs(peak), x[i], peak)
    return peak


@triton.jit
def _sums(x, factor, HALF: tl.constexpr):
    """Least squares of x against its levels, elements weighed by their squares."""
    sum_lx, sum_l2 = tl.zeros_like(factor), tl.zeros_like(factor)
    for i in tl.static_range(len(x)):
        # An element is at most the peak: adding and subtracting 1.5 * 2**23 rounds as integers do.
        level = (factor * x[i] + 12582912.0) - 12582912.0
        level = tl.where(level > -HALF, level, -HALF)
        level = tl.where(level < HALF - 1, level, HALF - 1)
        weight = x[i] * x[i]
        sum_lx = sum_lx + weight * x[i] * level
        sum_l2 = sum_l2 + weight * level * level
    return sum_lx, sum_l2


@triton.jit
def symmetric_search(x, grids, COUNT: tl.constexpr, HALF: tl.constexpr):
    """Find a scale so that x is near `scale * level`, level in -HALF..HALF - 1.

    Args:
        x: elements of every lane.
        grids: (COUNT,) float32, minus the intervals to the middle of every candidate.
        COUNT: of candidates.
        HALF: minus the lowest level.

    Returns:
        scale, 0 for what `empty` says; the factor that its levels are rounded from; and whether
        nothing in the sub-block reaches 1e-15 (GROUP_MAX_EPS).
    """
    peak = largest(x)
    empty = tl.abs(peak) < 1e-15
    # Nothing comes of an empty sub-block; 1 instead of its peak keeps infinities and NaN away.
    peak = tl.where(empty, 1.0, peak)
    fit_factor = tl.div_rn(tl.zeros_like(peak) + tl.load(grids), peak)
    sum_lx, sum_l2 = _sums(x, fit_factor, HALF)
    scale = tl.where(sum_l2 != 0.0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    for at in range(1, COUNT):
        factor = tl.div_rn(tl.zeros_like(peak) + tl.load(grids + at), peak)
        sum_lx, sum_l2 = _sums(x, factor, HALF)
        fit = tl.div_rn(sum_lx, sum_l2)
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        scale = tl.where(better, fit, scale)
        best = tl.where(better, fit * sum_lx, best)
        fit_factor = tl.where(better, factor, fit_factor)
    return tl.where(empty, 0.0, scale), fit_factor, empty
