"""Levels of IQ4_NL and IQ4_XS, and ggml's search for a sub-block's scale.

The 16 levels are not evenly spaced: dense around zero, wide apart at the ends. Which of them is
nearest follows from 15 midpoints; a number on a midpoint takes the upper level. The midpoints are
exact in float32, and so are the two differences that ggml compares there.

Arrays are (32, B), column b is sub-block b, and sums add rows in ggml's order. Source:
ggml-quants.c quantize_row_iq4_nl_impl, best_index_int8, ggml-common.h kvalues_iq4nl,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS, sum_rows

__all__ = ["MIDPOINTS", "STEPS", "VALUES", "columns", "find_scale", "nearest_level"]

_F = np.float32
VALUES = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32
)
MIDPOINTS = (VALUES[:-1] + VALUES[1:]) / _F(2)
STEPS = 7  # candidates on each side of the scale that puts the peak at the lowest level


def nearest_level(scaled: Float32) -> Bytes:
    """Index of the nearest level, elementwise."""
    return np.searchsorted(MIDPOINTS, scaled, side="right").astype(np.uint8)


def columns(blocks: Float32, importance: Float32 | None = None) -> tuple[Float32, Float32]:
    """Lay sub-blocks out in columns, with the weight of each element's squared error.

    Args:
        blocks: (B, 32) or (B, 256).
        importance: of the same shape, or None.

    Returns:
        elements and weights, (32, sub-blocks) each.
    """
    squares = blocks * blocks
    weight = squares
    if importance is not None:
        # Twice the mean square of the whole block; 2 / size is a power of two.
        power = sum_rows(squares.T)[:, None] * _F(2 / blocks.shape[1])
        weight = importance * np.sqrt(power + squares)
    x = np.ascontiguousarray(blocks.reshape(-1, 32).T)
    return x, np.ascontiguousarray(weight.reshape(-1, 32).T)


def find_scale(x: Float32, weight: Float32) -> Float32:
    """Find a scale of either sign so that x is near `scale * VALUES[level]`.

    Candidates put the element of largest magnitude at -127 and at -134 to -120; each is fitted by
    weighted least squares, and the best fit is kept.

    Args:
        x: (32, B) sub-blocks in columns.
        weight: (32, B) weight of each element's squared error.

    Returns:
        (B,), 0 for a sub-block with nothing larger than GROUP_MAX_EPS.
    """
    index = np.abs(x).argmax(axis=0)
    peak = np.take_along_axis(x, index[None], axis=0)[0]
    scale = best = np.zeros_like(peak)
    first = _F(1) / (-peak / VALUES[0])
    tries = (_F(step - 127) / peak for step in range(-STEPS, STEPS + 1))
    for number, iscale in enumerate((first, *tries)):
        value = VALUES[nearest_level(iscale * x)]
        weighted = weight * value
        sum_qx, sum_q2 = sum_rows(weighted * x), sum_rows(weighted * value)
        fit = sum_qx / sum_q2
        better = sum_q2 > 0
        if number:
            better &= sum_qx * sum_qx > best * sum_q2
        scale = np.where(better, fit, scale)
        best = np.where(better, fit * sum_qx, best)
    return np.where(np.abs(peak) < GROUP_MAX_EPS, _F(0), scale)
