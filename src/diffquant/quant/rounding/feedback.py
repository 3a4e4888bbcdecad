"""Error feedback: columns are rounded one after another, and later ones make up for each error.

What a weight error E costs a layer is tr(E H E^T), where H is the mean of x x^T over its inputs.
Once column j is rounded, the best that the columns still free can do is known in closed form: with
H^-1 = U^T U, U upper triangular, column t > j moves by -e_j U[j, t] / U[j, j]. This is GPTQ
(Frantar et al., arXiv:2210.17323), with scales that are chosen before the first column is rounded,
so that columns may go in any order, and every format of LEVELS is served. Columns with the
strongest inputs go first, while most others are still free to follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import QuantError
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.numba.rotation import rotate
from diffquant.quant.codecs.numba.rounding_lanes import feed_back, round_nearest
from diffquant.quant.rounding.levels import Levels

__all__ = ["DAMPING", "Carry", "carry_of", "feedback_codes", "nearest_codes"]

# Share of the diagonal's mean that is added to the diagonal: inputs seen are not all there are. On
# the demo models, of 0.01, 0.05, 0.2 and 1, 0.05 was best in pictures for nf4 (docs/rounding.md).
DAMPING = 0.05
_RETRIES = 6


@dataclass(frozen=True, slots=True)
class Carry:
    """How errors are carried inside one layer.

    Attributes:
        blocks: per diagonal block the order of its columns, and U[j, t] / U[j, j] in that order.
        importance: (K,) the diagonal of H: what an error weighs on its own, rotated where rows are.
        covariance: (B, b, b), as measured, never rotated.
    """

    blocks: tuple[tuple[NDArray[np.int64], Float32], ...]
    importance: Float32
    covariance: Float32

    def costs(self, weight: Float32, decoded: Float32) -> tuple[float, float]:
        """tr(E H E^T) of the error, and tr(W H W^T) of the weight itself."""
        return self._cost(decoded - weight), self._cost(weight)

    def _cost(self, rows: Float32) -> float:
        size, total = self.covariance.shape[1], 0.0
        for index, block in enumerate(self.covariance):
            part = rows[:, index * size : (index + 1) * size]
            total += float(np.einsum("rk,rk->", part @ block, part, dtype=np.float64))
        return total


def carry_of(covariance: Float32, *, damping: float = DAMPING, rotation: int = 0) -> Carry:
    """Prepare a layer's covariance.

    Args:
        covariance: (K, K) mean of x x^T, or (B, b, b) its diagonal blocks.
        damping: share of the diagonal's mean that is added to the diagonal.
        rotation: group in which the format rotates rows: inputs are rotated with them, R H R^T.

    Raises:
        QuantError: no covariance: far from positive definite.
    """
    stacked = covariance if covariance.ndim == 3 else covariance[None]
    seen = np.stack([_turned(block, rotation) for block in stacked]) if rotation else stacked
    diagonal = np.diagonal(seen, axis1=1, axis2=2).reshape(-1)
    return Carry(
        tuple(_prepared(block.astype(np.float64), damping) for block in seen),
        diagonal.astype(np.float32),
        stacked,
    )


def _turned(block: Float32, group: int) -> Float32:
    """R H R^T: rows, then columns."""
    rows = rotate(np.ascontiguousarray(block, np.float32), group)
    return rotate(np.ascontiguousarray(rows.T), group).T


def _prepared(h: NDArray[np.float64], damping: float) -> tuple[NDArray[np.int64], Float32]:
    diagonal = np.diagonal(h).copy()
    silent = diagonal <= 0  # a column that never sees an input: any value will do
    mean = float(diagonal.mean()) if diagonal.size else 0.0
    h[silent, silent] = 1.0 if mean <= 0 else mean
    order = np.argsort(-diagonal, kind="stable")
    h = h[np.ix_(order, order)]
    h = (h + h.T) / 2
    for attempt in range(_RETRIES):
        damped = h + np.eye(len(h)) * (damping * 10**attempt * max(mean, 1e-30))
        try:
            lower = np.linalg.cholesky(damped)
            half = np.linalg.inv(lower)
            upper = np.linalg.cholesky(half.T @ half).T
        except np.linalg.LinAlgError:
            continue
        factor = (upper / np.diagonal(upper)[:, None]).astype(np.float32)
        if np.isfinite(factor).all():
            return order, np.ascontiguousarray(factor)
    raise QuantError(
        "the covariance of a layer's inputs is not positive definite, even when damped: the file "
        "of input statistics is damaged; measure it again with `diffquant calibrate --inputs`"
    )


def feedback_codes(weight: Float32, scale: Float32, carry: Carry, row: Levels) -> Bytes:
    """Round a weight under given scales; (R, K) positions in `row.values`.

    Args:
        weight: (R, K) float32.
        scale: (R, K) float32.
        carry: of the layer.
        row: the format.
    """
    position = np.empty(weight.shape, np.uint8)
    zero = int(np.searchsorted(row.values, np.float32(0)))
    start = 0
    for order, factor in carry.blocks:
        columns = start + order
        left = np.ascontiguousarray(weight[:, columns])
        found = np.empty(left.shape, np.uint8)
        under = np.ascontiguousarray(scale[:, columns])
        feed_back(left, under, row.values, row.bounds, zero, factor, found)
        position[:, columns] = found
        start += len(order)
    return position


def nearest_codes(weight: Float32, scale: Float32, row: Levels) -> Bytes:
    """Round every element for itself; (R, K) positions in `row.values`."""
    position = np.empty(weight.shape, np.uint8)
    zero = int(np.searchsorted(row.values, np.float32(0)))
    round_nearest(weight, scale, row.bounds, zero, position)
    return position
