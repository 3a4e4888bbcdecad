"""Kernels of rounding: the nearest level, the best scale of a run, and error feedback.

Sums run in a fixed order, one row or run after another: the bytes do not depend on how rows are
cut into chunks or on how many threads there are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.numba.compile import inlined, kernel

__all__ = ["BATCH", "feed_back", "pick_scales", "round_nearest"]

BATCH = 128  # columns whose errors reach the rest of a row together
_TILE = 512  # columns of the rest at a time: they and their factors stay in the cache
_ZERO = np.float32(0)


@inlined
def _position(scaled: np.float32, bounds: Float32) -> int:
    # How many bounds lie below; NaN lies below all.
    low, high = 0, bounds.size
    while low < high:
        middle = (low + high) // 2
        if bounds[middle] < scaled:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _cost(
    run: Float32,
    weigh: Float32,
    first: int,
    scale: np.float32,
    values: Float32,
    bounds: Float32,
    limit: float,
) -> float:
    # Weighted squared error of a run under a scale; stops where it exceeds `limit`.
    total = 0.0
    at = first
    for i in range(run.size):
        x = run[i]
        best = np.float32(values[_position(x / scale, bounds)] * scale) if scale != _ZERO else _ZERO
        gap = np.float64(x) - np.float64(best)
        total += gap * gap * np.float64(weigh[at])
        if total > limit:
            return total
        at += 1
        if at == weigh.size:
            at = 0
    return total


@kernel
def pick_scales(
    runs: Float32,
    weigh: Float32,
    candidates: Float32,
    values: Float32,
    bounds: Float32,
    refits: int,
    scales: Float32,
    chosen: NDArray[np.int64],
) -> None:
    """Pick each run's best scale among its candidates, an earlier one in a tie.

    Args:
        runs: (B, size).
        weigh: (P,), what column (b * size + i) % P weighs.
        candidates: (B, C), the plain encoder's first.
        values: (V,) ascending.
        bounds: (V - 1,).
        refits: how often the best is replaced by the least-squares scale of its own levels, where
            that is better; 0 where only candidates can be stored.
        scales: (B,), filled.
        chosen: (B,), filled with the candidate's index.
    """
    size, period = runs.shape[1], weigh.size
    for b in range(runs.shape[0]):
        first = (b * size) % period
        best, found = np.inf, 0
        for c in range(candidates.shape[1]):
            cost = _cost(runs[b], weigh, first, candidates[b, c], values, bounds, best)
            if cost < best:
                best, found = cost, c
        scale = candidates[b, found]
        for _ in range(refits):
            if scale == _ZERO:
                break
            over, under, at = 0.0, 0.0, first
            for i in range(size):
                level = np.float64(values[_position(runs[b, i] / scale, bounds)])
                over += np.float64(weigh[at]) * np.float64(runs[b, i]) * level
                under += np.float64(weigh[at]) * level * level
                at += 1
                if at == period:
                    at = 0
            if not (under > 0.0 and over > 0.0):
                break
            other = np.float32(over / under)
            if not np.isfinite(other) or other == _ZERO:
                break
            cost = _cost(runs[b], weigh, first, other, values, bounds, best)
            if not cost < best:
                break
            best, scale = cost, other
        scales[b], chosen[b] = scale, found


@kernel
def round_nearest(
    weight: Float32, scale: Float32, bounds: Float32, zero: int, position: Bytes
) -> None:
    """Round every element to its nearest level, a scale of 0 to the level `zero`."""
    for r in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            s = scale[r, k]
            at = _position(weight[r, k] / s, bounds) if s != _ZERO else zero
            position[r, k] = np.uint8(at)


@kernel
def feed_back(
    weight: Float32,
    scale: Float32,
    values: Float32,
    bounds: Float32,
    zero: int,
    factor: Float32,
    position: Bytes,
) -> None:
    """Round column after column, and let the columns to come make up for each error.

    Args:
        weight: (R, K), changed: what is left to be rounded.
        scale: (R, K).
        values: (V,) ascending.
        bounds: (V - 1,).
        zero: position of the level that a scale of 0 gets.
        factor: (K, K), U[j, t] / U[j, j]: how the error of column j is carried to column t > j.
        position: (R, K), filled.
    """
    rows, columns = weight.shape
    errors = np.empty((rows, BATCH), np.float32)
    for start in range(0, columns, BATCH):
        stop = min(start + BATCH, columns)
        for r in range(rows):
            for j in range(start, stop):
                s, x = scale[r, j], weight[r, j]
                at = _position(x / s, bounds) if s != _ZERO else zero
                position[r, j] = np.uint8(at)
                error = np.float32(x - np.float32(values[at] * s))
                errors[r, j - start] = error
                for t in range(j + 1, stop):
                    weight[r, t] -= np.float32(error * factor[j, t])
        for tile in range(stop, columns, _TILE):
            end = min(tile + _TILE, columns)
            for r in range(rows):
                for j in range(start, stop):
                    error = errors[r, j - start]
                    for t in range(tile, end):
                        weight[r, t] -= np.float32(error * factor[j, t])
