"""Device functions: codecs/affine_search.py's search, one sub-block in each lane.

Levels are small integers held as floats. A candidate's are kept for its error, not computed twice
as in numba/affine_lanes.py: a card has the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from diffquant.quant.codecs.triton.numbers import usable

__all__ = ["affine_levels", "affine_search", "spread_weights"]


@triton.jit
def spread_weights(x):
    """Root mean square of a sub-block, to which an element's weight adds its magnitude."""
    total = x[0] * x[0]
    for i in tl.static_range(1, len(x)):
        total = total + x[i] * x[i]
    return tl.sqrt_rn(tl.div_rn(total, tl.full(total.shape, len(x), tl.float32)))


@triton.jit
def _level(x, factor, low, TOP: tl.constexpr):
    # nearest_int(factor * (x - low)) cut to 0..TOP, left as the fraction of a float from 2**23 on.
    value = factor * (x - low)
    value = tl.where(value == value, value, 0.0)  # as in nearest_int
    bits = (value + 12582912.0).to(tl.int32, bitcast=True) & 0x7FFFFF
    bits = tl.minimum(tl.maximum(bits, 0x400000), 0x400000 + TOP)
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def affine_levels(x, factor, low, TOP: tl.constexpr):
    """nearest_int(factor * (x - low)) cut to 0..TOP, as a tuple of float32."""
    found = ()
    for i in tl.static_range(len(x)):
        found = found + (_level(x[i], factor, low, TOP),)
    return found


@triton.jit
def _weight(x, weight, AT: tl.constexpr, WEIGHTED: tl.constexpr):
    return weight[AT] if WEIGHTED else weight + tl.abs(x[AT])


@triton.jit
def _error(x, weight, levels, scale, low, ABSOLUTE: tl.constexpr, WEIGHTED: tl.constexpr):
    total = tl.zeros_like(low)
    for i in tl.static_range(len(x)):
        diff = scale * levels[i] + low - x[i]
        distance = tl.abs(diff) if ABSOLUTE else diff * diff
        total = total + _weight(x, weight, i, WEIGHTED) * distance
    return total


@triton.jit
def affine_search(
    x,
    weight,
    grids,
    COUNT: tl.constexpr,
    TOP: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Find scale and minimum so that x is near `scale * level + low`, level in 0..TOP.

    Args:
        x: elements of every lane.
        weight: of every element's error, a tuple; or what its magnitude is added to for it.
        grids: (COUNT,) float32, intervals of the candidates after the plain one.
        COUNT: of candidates.
        TOP: largest level.
        ABSOLUTE: compare fits by absolute instead of squared errors.
        WEIGHTED: whether `weight` is a tuple.

    Returns:
        scale; low, not above 0; what `affine_levels` makes the levels of the best candidate from,
        factor and low; and the sum of weights.
    """
    first, high = x[0], x[0]
    sum_w = _weight(x, weight, 0, WEIGHTED)
    sum_x = sum_w * x[0]
    for i in tl.static_range(1, len(x)):
        w = _weight(x, weight, i, WEIGHTED)
        first = tl.where(x[i] < first, x[i], first)
        high = tl.where(x[i] > high, x[i], high)
        sum_w = sum_w + w
        sum_x = sum_x + w * x[i]
    low = tl.where(first > 0.0, 0.0, first)
    flat = high == low
    start = low
    plain = tl.div_rn(tl.full(low.shape, TOP, tl.float32), high - low)
    scale = tl.div_rn(tl.full(low.shape, 1.0, tl.float32), plain)
    fit_factor, fit_low = usable(plain), low
    levels = affine_levels(x, fit_factor, low, TOP)
    error = _error(x, weight, levels, scale, low, ABSOLUTE, WEIGHTED)
    for at in range(COUNT):
        intervals = tl.zeros_like(low) + tl.load(grids + at)
        factor = usable(tl.div_rn(intervals, high - low))
        levels = affine_levels(x, factor, low, TOP)
        sum_l = tl.zeros_like(low)
        sum_l2 = tl.zeros_like(low)
        sum_xl = tl.zeros_like(low)
        for i in tl.static_range(len(x)):
            weighted = _weight(x, weight, i, WEIGHTED) * levels[i]
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * levels[i]
            sum_xl = sum_xl + weighted * x[i]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        trial_scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, determinant)
        trial_low = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        above = trial_low > 0.0  # then refitted through 0
        trial_scale = tl.where(above, tl.div_rn(sum_xl, sum_l2), trial_scale)
        trial_low = tl.where(above, 0.0, trial_low)
        trial_error = _error(x, weight, levels, trial_scale, trial_low, ABSOLUTE, WEIGHTED)
        better = (determinant > 0.0) & (trial_error < error)
        fit_factor = tl.where(better, factor, fit_factor)
        fit_low = tl.where(better, low, fit_low)
        error = tl.where(better, trial_error, error)
        scale = tl.where(better, trial_scale, scale)
        low = tl.where(better, trial_low, low)  # the next candidate starts from this minimum
    scale = tl.where(flat, 0.0, scale)
    low = tl.where(flat, start, low)
    fit_factor = tl.where(flat, 0.0, fit_factor)
    return scale, low, fit_factor, fit_low, sum_w
