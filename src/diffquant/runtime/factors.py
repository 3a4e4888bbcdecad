"""The factors of quant/lowrank.py, found on another device: products and decompositions by torch.

The same algorithm on the same random block, so that a device's factors differ from the processor's
by rounding alone. One matrix is on the device at a time, with a block Krylov basis beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diffquant.quant.lowrank import Matrix, best_factors

__all__ = ["factors_on"]

_SPARE = 8  # as in quant/lowrank.py
_DEPTH = 4
_DISTINCT = 1e-3


def factors_on(device: str) -> Callable[..., tuple[Matrix, Matrix]]:
    """`best_factors(error, rank, seed=...)` on a device; the processor's own for "cpu"."""
    if device == "cpu":
        return best_factors
    return partial(_factors, device=torch.device(device))


def _factors(
    error: Matrix, rank: int, *, seed: int = 0, device: torch.device
) -> tuple[Matrix, Matrix]:
    """The best factors of one matrix (N, K): up (N, r), down (r, K), float32."""
    rows, columns = error.shape
    matrix = torch.from_numpy(error).to(device)
    width = rank + _SPARE
    if width * (_DEPTH + 1) < min(rows, columns):
        start = np.random.Generator(np.random.PCG64(seed)).standard_normal(
            (columns, width), np.float32
        )
        basis = _krylov(matrix, torch.from_numpy(start).to(device))
    else:
        basis = torch.eye(rows, device=device) if rows <= columns else _qr(matrix)
    images = basis.T @ matrix  # (m, K)
    _, vectors = _eigh(images @ images.T)
    leading = vectors.flip(1)[:, :rank].contiguous()
    up, down = basis @ leading, leading.T @ images
    return _balanced(up.cpu().numpy(), down.cpu().numpy())


def _krylov(matrix: Tensor, start: Tensor) -> Tensor:
    """An orthonormal basis of what E E^T makes of a random block: (N, at most width * 5)."""
    block = matrix @ start
    blocks: list[Tensor] = []
    for _ in range(_DEPTH + 1):
        for earlier in blocks:
            block = block - earlier @ (earlier.T @ block)
        blocks.append(_qr(block))
        block = matrix @ (matrix.T @ blocks[-1])
    joined = torch.cat(blocks, dim=1)
    values, vectors = _eigh(joined.T @ joined)
    kept = values > _DISTINCT
    return joined @ (vectors[:, kept] / values[kept].sqrt())


def _qr(block: Tensor) -> Tensor:
    """Orthonormal columns."""
    found: Tensor = torch.linalg.qr(block).Q
    return found


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a small matrix, in float64 where it is: Metal has none."""
    values, vectors = torch.linalg.eigh(gram.cpu().double())
    return values.float().to(gram.device), vectors.float().to(gram.device)


def _balanced(up: Matrix, down: Matrix) -> tuple[Matrix, Matrix]:
    """Share a pair's size between its two factors; fix its sign."""
    size = np.linalg.norm(down, axis=1)
    root = np.sqrt(size)
    inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    at = np.abs(up).argmax(axis=0)
    sign = np.where(up[at, np.arange(up.shape[1])] < 0, np.float32(-1), np.float32(1))
    return up * (root * sign), down * (inverse * sign)[:, None]
