"""Device functions: codecs/scale_search.py's symmetric search, one sub-block in each lane."""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["largest", "symmetric_grids", "symmetric_search"]

_STEPS = (0, *range(-9, 0), *range(1, 10))


@triton.jit
def largest(x):
    """First element of largest magnitude, sign kept; +0 for zeros."""
    peak = tl.zeros_like(x[0])
    for i in tl.static_range(len(x)):
        peak = tl.where(tl.abs(x[i]) > tl.abs(peak), x[i], peak)
    return peak


@triton.jit
def _sums(x, weight, factor, HALF: tl.constexpr, WEIGHTED: tl.constexpr):
    """Weighted least squares of x against its levels."""
    sum_lx, sum_l2 = tl.zeros_like(factor), tl.zeros_like(factor)
    for i in tl.static_range(len(x)):
        # An element is at most the peak: adding and subtracting 1.5 * 2**23 rounds as integers do.
        level = (factor * x[i] + 12582912.0) - 12582912.0
        level = tl.where(level > -HALF, level, -HALF)
        level = tl.where(level < HALF - 1, level, HALF - 1)
        w = weight[i] if WEIGHTED else x[i] * x[i]
        sum_lx = sum_lx + w * x[i] * level
        sum_l2 = sum_l2 + w * level * level
    return sum_lx, sum_l2


@triton.jit
def symmetric_search(
    x, weight, grids, COUNT: tl.constexpr, HALF: tl.constexpr, WEIGHTED: tl.constexpr
):
    """Find a scale so that x is near `scale * level`, level in -HALF..HALF - 1.

    Args:
        x: elements of every lane.
        weight: of their squared errors, a tuple; anything where these are the elements squared.
        grids: (COUNT,) float32, minus the intervals to the middle of every candidate.
        COUNT: of candidates.
        HALF: minus the lowest level.
        WEIGHTED: whether `weight` is a tuple.

    Returns:
        scale, 0 for what `empty` says; the factor that its levels are rounded from; and whether
        nothing in the sub-block reaches 1e-15 (GROUP_MAX_EPS).
    """
    peak = largest(x)
    empty = tl.abs(peak) < 1e-15
    # Nothing comes of an empty sub-block; 1 instead of its peak keeps infinities and NaN away.
    peak = tl.where(empty, 1.0, peak)
    fit_factor = tl.div_rn(tl.zeros_like(peak) + tl.load(grids), peak)
    sum_lx, sum_l2 = _sums(x, weight, fit_factor, HALF, WEIGHTED)
    scale = tl.where(sum_l2 != 0.0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    for at in range(1, COUNT):
        factor = tl.div_rn(tl.zeros_like(peak) + tl.load(grids + at), peak)
        sum_lx, sum_l2 = _sums(x, weight, factor, HALF, WEIGHTED)
        fit = tl.div_rn(sum_lx, sum_l2)
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        scale = tl.where(better, fit, scale)
        best = tl.where(better, fit * sum_lx, best)
        fit_factor = tl.where(better, factor, fit_factor)
    return tl.where(empty, 0.0, scale), fit_factor, empty


@functools.cache
def symmetric_grids(half: int, device: torch.device) -> Tensor:
    """Minus the intervals of every candidate, rounded as the CPU's search rounds them: (19,)."""
    step = np.float32(0.1)
    found = np.array([-(np.float32(half) + step * np.float32(i)) for i in _STEPS], np.float32)
    return torch.from_numpy(found).to(device)
