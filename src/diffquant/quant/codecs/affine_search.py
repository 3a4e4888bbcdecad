"""ggml's searches of the affine formats: scale and minimum of a sub-block, then steps of scales.

All sub-blocks are searched side by side: arrays are (n, B), column b is sub-block b, and a loop
over n adds its elements in ggml's order, so every float32 rounding is ggml's. Source:
ggml-quants.c make_qkx2_quants and make_qkx3_quants (which differ in nothing but the names once
weights are given), make_qp_quants, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32, Int32
from diffquant.quant.codecs.fields import nearest_int
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS, sum_rows

__all__ = [
    "WEIGHTED",
    "Candidates",
    "affine_search",
    "columns_of",
    "mean_squares",
    "positive_search",
    "weigh",
    "weighted_blocks",
]

_F = np.float32


class Candidates(NamedTuple):
    """Grids to try: `top + first + step * i` intervals from the minimum to the largest element."""

    first: float
    step: float
    steps: int  # i = 0 .. steps


WEIGHTED = Candidates(-0.9, 0.05, 36)  # every affine format's, with importance


def columns_of(blocks: Float32, size: int) -> Float32:
    """Sub-blocks of `size` elements as columns: any shape -> (size, B)."""
    return np.ascontiguousarray(blocks.reshape(-1, size).T)


def mean_squares(groups: Float32, factor: float = 1.0) -> Float32:
    """(G, n) -> (G,): `factor` times the sum of squares, over n."""
    return _F(factor) * sum_rows(np.ascontiguousarray((groups * groups).T)) / _F(groups.shape[1])


def weigh(x: Float32, importance: Float32, sigma2: Float32) -> Float32:
    """Weigh elements by importance and by their size beside that of their neighbours.

    Args:
        x: (size, B) sub-blocks in columns, those of a row of the weight side by side.
        importance: (K,) value of each column of the weight.
        sigma2: one value for each equal run of sub-blocks: the mean square of their elements.

    Returns:
        (size, B).
    """
    size, count = x.shape
    column = columns_of(importance, size)  # (size, K / size)
    spread = np.sqrt(sigma2.repeat(count // sigma2.size) + x * x)
    weighted: Float32 = np.tile(column, (1, count // column.shape[1])) * spread
    return weighted


def _levels(x: Float32, iscale: Float32, low: Float32, top: int) -> Int32:
    levels: Int32 = np.clip(nearest_int(iscale * (x - low)), 0, top)
    return levels


def affine_search(
    x: Float32,
    weight: Float32,
    top: int,
    candidates: Candidates,
    *,
    absolute: bool = False,
) -> tuple[Float32, Float32, Int32]:
    """Find scale and minimum so that x is near `scale * level - minimum`, level in 0..top.

    Each candidate grid gives levels, the levels a weighted least squares fit, the fit an error.

    Args:
        x: (n, B) sub-blocks in columns.
        weight: (n, B) weight of each element's error.
        top: largest level.
        candidates: grids to try after the plain one with `top` intervals.
        absolute: compare fits by absolute instead of squared errors.

    Returns:
        scale (B,), minimum (B,) not negative, levels (n, B).
    """
    first = x.argmin(axis=0)[None]  # of equal zeros the first, whose sign may be stored
    low, high = np.take_along_axis(x, first, axis=0)[0], x.max(axis=0)
    sum_w, sum_x = sum_rows(weight), sum_rows(weight * x)
    low = np.where(low > 0, _F(0), low)
    flat = high == low
    iscale = _F(top) / (high - low)
    scale = _F(1) / iscale
    levels = _levels(x, iscale, low, top)
    error = _error(x, weight, levels, scale, low, absolute=absolute)
    for step in range(candidates.steps + 1):
        offset = _F(_F(candidates.first) + _F(_F(candidates.step) * _F(step)))
        trial = _levels(x, _F(offset + _F(top)) / (high - low), low, top)
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
        trial_error = _error(x, weight, trial, trial_scale, trial_low, absolute=absolute)
        better = (determinant > 0) & (trial_error < error)
        levels = np.where(better, trial, levels)
        error = np.where(better, trial_error, error)
        scale = np.where(better, trial_scale, scale)
        low = np.where(better, trial_low, low)  # the next candidate starts from this minimum
    return np.where(flat, _F(0), scale), -low, np.where(flat, 0, levels)


def _error(
    x: Float32, weight: Float32, levels: Int32, scale: Float32, low: Float32, *, absolute: bool
) -> Float32:
    diff = scale * levels.astype(np.float32) + low - x
    return sum_rows(weight * (np.abs(diff) if absolute else diff * diff))


def positive_search(x: Float32, weight: Float32, top: int) -> tuple[Float32, Bytes]:
    """Find one scale so that x, not negative, is near `scale * level`, level in 0..top.

    The best of nine grids is fitted by least squares; then, in up to five sweeps, each level in
    turn is moved to where the fit of the others wants it, if that lowers the error. Levels are kept
    in bytes as in C: one that came out negative (a scale can, by rounding) wraps.

    Args:
        x: (n, B) values in columns.
        weight: (n, B) weight of each squared error.
        top: largest level.

    Returns:
        scale (B,), levels (n, B); all 0 where no value reaches GROUP_MAX_EPS.
    """
    most = np.maximum(x.max(axis=0), _F(0))
    iscale = _F(top) / most
    error = _wrapped_error(x, weight, nearest_int(iscale * x) & 255, _F(1) / iscale)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = _F(_F(_F(0.1) * _F(step)) + _F(top)) / most
        levels = np.minimum(nearest_int(trial * x), top)
        trial_error = _wrapped_error(x, weight, levels, _F(1) / trial)
        better = trial_error < error
        error = np.where(better, trial_error, error)
        iscale = np.where(better, trial, iscale)
    levels = np.minimum(nearest_int(iscale * x), top)
    level = levels.astype(np.float32)
    sum_lx = _F(0) + sum_rows(weight * x * level)  # from +0 as in C: the scale's sign is stored
    sum_l2 = _F(0) + sum_rows(weight * level * level)
    levels = levels & 255
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            wx, w, level = weight[i] * x[i], weight[i], levels[i].astype(np.float32)
            rest_lx, rest_l2 = sum_lx - wx * level, sum_l2 - w * level * level
            moved = np.minimum(nearest_int(x[i] * rest_l2 / rest_lx), top)
            to = moved.astype(np.float32)
            trial_lx, trial_l2 = rest_lx + wx * to, rest_l2 + w * to * to
            gain = trial_lx * trial_lx * sum_l2 > sum_lx * sum_lx * trial_l2
            better = (rest_lx > 0) & (rest_l2 > 0) & (moved != levels[i]) & gain
            levels[i] = np.where(better, moved & 255, levels[i])
            sum_lx = np.where(better, trial_lx, sum_lx)
            sum_l2 = np.where(better, trial_l2, sum_l2)
            changed = changed or bool(better.any())
        if not changed:
            break
    empty = most < GROUP_MAX_EPS
    scale = np.where(sum_l2 > 0, sum_lx / sum_l2, _F(0))
    return np.where(empty, _F(0), scale), np.where(empty, 0, levels).astype(np.uint8)


def _wrapped_error(x: Float32, weight: Float32, levels: Int32, scale: Float32) -> Float32:
    diff = x - scale * levels.astype(np.float32)
    return sum_rows(weight * diff * diff)


def weighted_blocks(
    weight: Float32, importance: Float32, top: int
) -> tuple[Float32, Float32, Bytes]:
    """Search blocks of 32 that each store scale and minimum, weighed by the row they stand in.

    Args:
        weight: (R, K) float32.
        importance: (K,) float32.
        top: largest level.

    Returns:
        scale (B,), smallest value (B,) as stored, not above 0, levels (B, 32).
    """
    x = columns_of(weight, 32)
    weights = weigh(x, importance, mean_squares(weight))
    scale, minimum, levels = affine_search(x, weights, top, WEIGHTED)
    return scale, -minimum, levels.T.astype(np.uint8)
