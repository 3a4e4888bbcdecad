"""How the affine formats weigh errors: from the elements alone, or with importance. Lanes again.

Each function reads the elements that affine_lanes.load left in rows 0 to size - 1 of a grid and
fills rows size to 2 * size - 1, in the reference's order of operations.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32, frozen
from diffquant.quant.codecs.numba.affine_lanes import SIGMA
from diffquant.quant.codecs.numba.compile import kernel, merged
from diffquant.quant.codecs.numba.lanes import LANES

__all__ = ["by_importance", "by_magnitude", "by_spread", "mean_squares"]

_ZERO = np.float32(0)


@merged
def by_magnitude(grid: Float32, size: int) -> None:
    """Weights are the magnitudes: Q2_K's."""
    for i in range(size):
        for k in range(LANES):
            grid[size + i, k] = abs(grid[i, k])


@merged
def by_spread(grid: Float32, state: Float32, size: int) -> None:
    """Weights are the root mean square of the sub-block plus the magnitude: Q4_K's and Q5_K's."""
    for k in range(LANES):
        state[SIGMA, k] = _ZERO
    for i in range(size):
        for k in range(LANES):
            state[SIGMA, k] += np.float32(grid[i, k] * grid[i, k])
    for k in range(LANES):
        state[SIGMA, k] = np.sqrt(np.float32(state[SIGMA, k] / np.float32(size)))
    for i in range(size):
        for k in range(LANES):
            grid[size + i, k] = np.float32(state[SIGMA, k] + abs(grid[i, k]))


@kernel
def _mean_squares(groups: Float32, factor: np.float32, found: Float32) -> None:
    count, size = groups.shape
    for start in range(0, count, 4):
        # Four chains of additions side by side: one alone would wait for itself.
        a, b = start, min(start + 1, count - 1)
        c, d = min(start + 2, count - 1), min(start + 3, count - 1)
        sum_a = sum_b = sum_c = sum_d = _ZERO
        for i in range(size):
            sum_a = np.float32(sum_a + np.float32(groups[a, i] * groups[a, i]))
            sum_b = np.float32(sum_b + np.float32(groups[b, i] * groups[b, i]))
            sum_c = np.float32(sum_c + np.float32(groups[c, i] * groups[c, i]))
            sum_d = np.float32(sum_d + np.float32(groups[d, i] * groups[d, i]))
        found[a] = np.float32(np.float32(factor * sum_a) / np.float32(size))
        found[b] = np.float32(np.float32(factor * sum_b) / np.float32(size))
        found[c] = np.float32(np.float32(factor * sum_c) / np.float32(size))
        found[d] = np.float32(np.float32(factor * sum_d) / np.float32(size))


@merged
def by_importance(
    grid: Float32,
    state: Float32,
    start: int,
    importance: Float32,
    sigma2: Float32,
    run: int,
) -> None:
    """Weights are importance * sqrt(sigma2 + x * x).

    Args:
        grid: as above.
        state: scratch.
        start: number of the sub-block in lane 0, counted over all rows.
        importance: (K / size, size).
        sigma2: one mean square for each `run` of sub-blocks.
        run: sub-blocks that share one.
    """
    columns, size = importance.shape
    for k in range(LANES):
        column = (start + k) % columns
        state[SIGMA, k] = sigma2[min((start + k) // run, sigma2.size - 1)]
        for i in range(size):
            grid[size + i, k] = importance[column, i]
    for i in range(size):
        for k in range(LANES):
            x = grid[i, k]
            spread = np.sqrt(np.float32(state[SIGMA, k] + np.float32(x * x)))
            grid[size + i, k] = np.float32(grid[size + i, k] * spread)


def mean_squares(weight: Float32, size: int, factor: float = 1.0) -> Float32:
    """`factor` times the mean square of each run of `size` elements."""
    groups = frozen(weight, (-1, size))
    found = np.empty(len(groups), np.float32)
    _mean_squares(groups, np.float32(factor), found)
    return found
