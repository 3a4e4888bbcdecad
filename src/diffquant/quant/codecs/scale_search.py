"""ggml's searches for a sub-block's scale: candidate grids, least squares on each, best kept.

All sub-blocks are searched side by side: arrays are (n, B), column b is sub-block b, and a loop
over n adds its elements in ggml's order, so every float32 rounding is ggml's. Source:
ggml-quants.c make_qx_quants, ggml-org/llama.cpp@01243c5. The affine formats have theirs in
affine_search.py.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32, Int32
from diffquant.quant.codecs.fields import nearest_int, peak

__all__ = ["GROUP_MAX_EPS", "sum_rows", "symmetric_search"]

GROUP_MAX_EPS = np.float32(1e-15)  # a block with nothing larger is stored as zeros
_F = np.float32


def sum_rows(terms: Float32) -> Float32:
    """Add the rows of (n, B) first to last, from the first."""
    total: Float32 = terms[0].copy()
    for term in terms[1:]:
        total += term
    return total


def symmetric_search(x: Float32, half: int, weight: Float32 | None = None) -> tuple[Float32, Int32]:
    """Find a scale so that x is near `scale * (level - half)`, level in 0..2 * half - 1.

    Candidates put the element of largest magnitude at level 0 of grids with half - 0.9 to
    half + 0.9 intervals to the middle; each is fitted by weighted least squares.

    Args:
        x: (n, B) sub-blocks in columns.
        half: the level of zero.
        weight: (n, B) weight of each element's squared error; x squared where there is none.

    Returns:
        scale (B,), of either sign; levels (n, B), all 0 where the scale is 0.
    """
    top = peak(x.T)[:, 0]
    weight = x * x if weight is None else weight
    levels = scale = best = None
    for step in (0, *range(-9, 0), *range(1, 10)):
        intervals = _F(half) + _F(_F(0.1) * _F(step))
        trial = np.clip(nearest_int(-intervals / top * x), -half, half - 1)
        level = trial.astype(np.float32)
        sum_lx = sum_rows(weight * x * level) + _F(0)  # C starts from +0: nothing but -0 adds to +0
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
    empty = np.abs(top) < GROUP_MAX_EPS
    return np.where(empty, _F(0), scale), np.where(empty, 0, levels + half)
