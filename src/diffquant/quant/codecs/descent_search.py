"""ggml's search for a scale of few levels: one element at a time moves to its better level.

With the scale at its least squares value `sum_lx / sum_l2`, the squared error falls as
`sum_lx ** 2 / sum_l2` grows. Each element in turn takes the level nearest to it on the grid that
the other elements fit, where that makes the quotient grow; the sums follow at once, so the next
element sees them. Five rounds; one without a move ends it, and more rounds would move nothing.
Source: ggml-quants.c make_q3_quants with do_rmse, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32, Int32
from diffquant.quant.codecs.fields import nearest_int, peak
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS, sum_rows

__all__ = ["ROUNDS", "descent_search"]

ROUNDS = 5
_F = np.float32


def descent_search(x: Float32, half: int) -> tuple[Float32, Int32]:
    """Find a scale so that x is near `scale * (level - half)`, level in 0..2 * half - 1.

    Args:
        x: (n, B) sub-blocks in columns; errors are weighted with x squared.
        half: the level of zero.

    Returns:
        scale (B,), of either sign; levels (n, B), all 0 where nothing reaches GROUP_MAX_EPS.
    """
    top = peak(x.T)[:, 0]
    weight = x * x
    weighted = weight * x
    levels = np.clip(nearest_int(_F(-half) / top * x), -half, half - 1).astype(np.float32)
    sum_lx = sum_rows(weighted * levels)
    sum_l2 = sum_rows(weight * levels * levels)
    for _ in range(ROUNDS):
        for i in range(len(x)):
            rest_lx = sum_lx - weighted[i] * levels[i]
            rest_l2 = sum_l2 - weight[i] * levels[i] * levels[i]
            nearest = nearest_int(x[i] * rest_l2 / rest_lx)
            trial = np.clip(nearest, -half, half - 1).astype(np.float32)
            trial_lx = rest_lx + weighted[i] * trial
            trial_l2 = rest_l2 + weight[i] * trial * trial
            gain = trial_lx * trial_lx * sum_l2 > sum_lx * sum_lx * trial_l2
            better = (rest_lx > 0) & (trial != levels[i]) & (trial_l2 > 0) & gain
            levels[i] = np.where(better, trial, levels[i])
            sum_lx = np.where(better, trial_lx, sum_lx)
            sum_l2 = np.where(better, trial_l2, sum_l2)
    empty = np.abs(top) < GROUP_MAX_EPS
    scale: Float32 = np.where(~empty & (sum_l2 > 0), sum_lx / sum_l2, _F(0))
    return scale, np.where(empty, 0, levels.astype(np.int32) + half)
