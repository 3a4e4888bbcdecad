"""ggml's searches for a sub-block's scale: candidate grids, least squares on each, best kept.

All sub-blocks are searched side by side: arrays are (n, B), column b is sub-block b, and a loop
over n adds its elements in ggml's order, so every float32 rounding is ggml's. Source:
ggml-quants.c make_qkx2_quants (affine) and make_qx_quants (symmetric),
ggml-org/llama.cpp@01243c5, without importance.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32, Int32
from diffquant.quant.codecs.fields import nearest_int

__all__ = ["GROUP_MAX_EPS", "affine_search", "sum_rows", "symmetric_search"]

GROUP_MAX_EPS = np.float32(1e-15)  # a block with nothing larger is stored as zeros
_F = np.float32


def sum_rows(terms: Float32) -> Float32:
    """Add the rows of (n, B) first to last, from the first."""
    total: Float32 = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def _levels(x: Float32, iscale: Float32, low: Float32, top: int) -> Int32:
    levels: Int32 = np.clip(nearest_int(iscale * (x - low)), 0, top)
    return levels


def affine_search(
    x: Float32, weight: Float32, top: int, first: float, steps: int
) -> tuple[Float32, Float32, Int32]:
    """Find scale and minimum so that x is near `scale * level - minimum`, level in 0..top.

    Candidate grids have `top + first + 0.1 * step` intervals between the minimum and the largest
    element; each gives levels, the levels a weighted least squares fit, the fit an error.

    Args:
        x: (n, B) sub-blocks in columns.
        weight: (n, B) weight of each element's squared error.
        top: largest level.
        first: intervals to add to `top` in the first candidate.
        steps: candidates after the first.

    Returns:
        scale (B,), minimum (B,) not negative, levels (n, B).
    """
    low, high = x.min(axis=0), x.max(axis=0)
    sum_w, sum_x = sum_rows(weight), sum_rows(weight * x)
    low = np.where(low > 0, _F(0), low)
    flat = high == low
    iscale = _F(top) / (high - low)
    scale = _F(1) / iscale
    levels = _levels(x, iscale, low, top)
    error = _squared_error(x, weight, levels, scale, low)
    for step in range(steps + 1):
        intervals = _F(_F(first) + _F(_F(0.1) * _F(step))) + _F(top)
        trial = _levels(x, intervals / (high - low), low, top)
        level = trial.astype(np.float32)
        sum_l = sum_rows(weight * level)
        sum_l2 = sum_rows(weight * level * level)
        sum_xl = sum_rows(weight * level * x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        trial_scale: Float32 = np.divide(sum_w * sum_xl - sum_x * sum_l, determinant)
        trial_low: Float32 = np.divide(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        above = trial_low > 0
        trial_low = np.where(above, _F(0), trial_low)
        trial_scale = np.where(above, sum_xl / sum_l2, trial_scale)
        trial_error = _squared_error(x, weight, trial, trial_scale, trial_low)
        better = (determinant > 0) & (trial_error < error)
        levels = np.where(better, trial, levels)
        error = np.where(better, trial_error, error)
        scale = np.where(better, trial_scale, scale)
        low = np.where(better, trial_low, low)  # the next candidate starts from this minimum
    return np.where(flat, _F(0), scale), -low, np.where(flat, 0, levels)


def _squared_error(
    x: Float32, weight: Float32, levels: Int32, scale: Float32, low: Float32
) -> Float32:
    diff = scale * levels.astype(np.float32) + low - x
    return sum_rows(weight * (diff * diff))


def symmetric_search(x: Float32, half: int) -> tuple[Float32, Int32]:
    """Find a scale so that x is near `scale * (level - half)`, level in 0..2 * half - 1.

    Candidates put the element of largest magnitude at level 0 of grids with half - 0.9 to
    half + 0.9 intervals to the middle; each is fitted by least squares weighted with x squared.

    Args:
        x: (n, B) sub-blocks in columns.
        half: the level of zero.

    Returns:
        scale (B,), of either sign; levels (n, B), all 0 where the scale is 0.
    """
    index = np.abs(x).argmax(axis=0)
    peak = np.take_along_axis(x, index[None], axis=0)[0]
    weight = x * x
    levels = scale = best = None
    for step in (0, *range(-9, 0), *range(1, 10)):
        intervals = _F(half) + _F(_F(0.1) * _F(step))
        trial = np.clip(nearest_int(-intervals / peak * x), -half, half - 1)
        level = trial.astype(np.float32)
        sum_lx = sum_rows(weight * x * level)
        sum_l2 = sum_rows(weight * level * level)
        fit = sum_lx / sum_l2
        if levels is None or scale is None or best is None:
            levels, scale = trial, np.where(sum_l2 != 0, fit, _F(0))
            best = scale * sum_lx
            continue
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        levels = np.where(better, trial, levels)
        scale = np.where(better, fit, scale)
        best = np.where(better, fit * sum_lx, best)
    assert levels is not None
    assert scale is not None
    empty = np.abs(peak) < GROUP_MAX_EPS
    return np.where(empty, _F(0), scale), np.where(empty, 0, levels + half)
