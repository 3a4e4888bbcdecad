"""Weights of squared errors in lanes, from importance per column; see affine_search.weigh."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32
from diffquant.quant.codecs.numba.compile import inlined
from diffquant.quant.codecs.numba.lanes import LANES

__all__ = ["lane_columns", "weigh"]


def lane_columns(importance: Float32, size: int) -> Float32:
    """Importance by lane: (size, C + LANES - 1) for the C sub-blocks of a row.

    Lanes hold consecutive sub-blocks, also across row ends, so column c is that of sub-block
    c modulo C: whichever a batch starts with, its lanes find theirs side by side.
    """
    count = len(importance) // size
    by_block = importance.reshape(count, size).T
    return np.ascontiguousarray(by_block[:, np.arange(count + LANES - 1) % count])


@inlined
def weigh(
    grid: Float32,
    state: Float32,
    size: int,
    sigma2: Float32,
    period: int,
    columns: Float32,
    start: int,
) -> None:
    """Fill rows `size` to 2 * size - 1 of a grid: importance * sqrt(sigma2 + x * x).

    Args:
        grid: elements in the first `size` rows.
        state: its first row is scratch.
        size: elements of a sub-block.
        sigma2: one value for every `period` sub-blocks.
        period: sub-blocks that share one.
        columns: `lane_columns` of the importance.
        start: number of the first lane's sub-block.
    """
    first = start % (columns.shape[1] - LANES + 1)
    last = sigma2.shape[0] - 1
    for k in range(LANES):
        state[0, k] = sigma2[min((start + k) // period, last)]
    for i in range(size):
        for k in range(LANES):
            x = grid[i, k]
            root = np.sqrt(np.float32(state[0, k] + np.float32(x * x)))
            grid[size + i, k] = np.float32(columns[i, first + k] * root)
