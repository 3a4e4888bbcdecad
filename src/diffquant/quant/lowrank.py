"""The best correction of low rank: two thin factors that make up for most of an error matrix.

    minimise  tr((E - up @ down) H (E - up @ down)^T)      E (N, K), up (N, r), down (r, K)

H (K, K) is the mean of x x^T over a layer's inputs x, its diagonal (an importance matrix), or the
identity: what is minimised is the error of the layer's output, or of the weight alone. The solution
needs no inverse of H: up has the r leading eigenvectors of E H E^T as columns, and down = up^T E.

Errors of rounding have a flat spectrum, on which plain subspace iteration crawls. So the
eigenvectors are sought in a block Krylov space: a random block, and what E H E^T makes of it four
times over; small matrices are decomposed whole. The random block is seeded, and each pair of
factors has a sign that is defined: the bytes repeat on a machine, whatever the number of workers.

Source: Musco and Musco, Randomized Block Krylov Methods, arXiv 1504.05477, algorithm 2; the
weighted problem: Zhang et al., QERA, arXiv 2410.06040, theorem 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Matrix", "best_factors", "live_nbytes", "noise"]

Matrix = NDArray[np.float32]

_WHOLE = 256  # rows up to which E H E^T is decomposed whole
_SPARE = 8  # columns of a block beyond the rank
_DEPTH = 4  # products with E H E^T
_DISTINCT = 1e-3  # squared length below which a column is the others' noise
_ROWS = 1 << 20  # weights of the residual at once


def best_factors(
    error: Matrix, rank: int, *, weigh: Matrix | None = None, seed: int = 0
) -> tuple[Matrix, Matrix]:
    """Find the factors; of equal size in each pair of column and row.

    Args:
        error: (N, K) float32, finite, not modified.
        rank: r, at most min(N, K).
        weigh: H as (K,), (K, K) or its diagonal blocks (B, K / B, K / B); None: the identity.
        seed: of the random block.

    Returns:
        up (N, r), down (r, K), float32.
    """
    rows, columns = error.shape
    whole = max(_WHOLE, (rank + _SPARE) * (_DEPTH + 1))
    if rows <= whole:
        basis = None
    elif columns <= whole:
        basis = np.linalg.qr(error)[0]
    else:
        basis = _krylov(error, rank + _SPARE, weigh, seed)
    images: Matrix = error if basis is None else basis.T @ error  # (m, K)
    inner = images @ _weighed(images.T, weigh)  # (m, m)
    _, vectors = np.linalg.eigh(inner.astype(np.float64))
    leading: Matrix = np.ascontiguousarray(vectors[:, ::-1][:, :rank], np.float32)
    up: Matrix = leading if basis is None else basis @ leading
    down: Matrix = leading.T @ images
    return _balanced(up, down)


def _krylov(error: Matrix, width: int, weigh: Matrix | None, seed: int) -> Matrix:
    """An orthonormal basis of what E H E^T makes of a random block: (N, width * (_DEPTH + 1))."""
    start = np.random.Generator(np.random.PCG64(seed)).standard_normal(
        (error.shape[1], width), np.float32
    )
    block = error @ _weighed(start, weigh)
    blocks = np.empty((len(error), width * (_DEPTH + 1)), np.float32)
    for at in range(0, blocks.shape[1], width):
        earlier = blocks[:, :at]
        block -= earlier @ (earlier.T @ block)
        blocks[:, at : at + width] = np.linalg.qr(block)[0]
        block = error @ _weighed(error.T @ blocks[:, at : at + width], weigh)
    return _orthogonal(blocks)


def _orthogonal(blocks: Matrix) -> Matrix:
    """An orthonormal basis of columns that almost are one.

    Where the error has fewer directions than were sought, later blocks are noise along earlier
    ones. By products and not by numpy's QR: that works on copies in float64.
    """
    values, vectors = np.linalg.eigh((blocks.T @ blocks).astype(np.float64))
    kept = values > _DISTINCT
    basis: Matrix = blocks @ (vectors[:, kept] / np.sqrt(values[kept])).astype(np.float32)
    return basis


def _weighed(columns: Matrix, weigh: Matrix | None) -> Matrix:
    """H @ columns."""
    if weigh is None:
        return columns
    if weigh.ndim == 1:
        return weigh[:, None] * columns
    if weigh.ndim == 2:
        return weigh @ columns
    count, size, _ = weigh.shape
    return (weigh @ columns.reshape(count, size, -1)).reshape(columns.shape)


def _balanced(up: Matrix, down: Matrix) -> tuple[Matrix, Matrix]:
    """Share a pair's size between its two factors, so that float16 holds both; fix its sign."""
    size = np.linalg.norm(down, axis=1)
    root = np.sqrt(size)
    inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    at = np.abs(up).argmax(axis=0)
    sign = np.where(up[at, np.arange(up.shape[1])] < 0, np.float32(-1), np.float32(1))
    return up * (root * sign), down * (inverse * sign)[:, None]


def noise(
    error: Matrix, up: Matrix, down: Matrix, *, weigh: Matrix | None = None
) -> tuple[float, float]:
    """Squared size of the error before and after the correction; of the outputs', with `weigh`."""
    before = after = 0.0
    step = max(_ROWS // error.shape[1], 1)
    for start in range(0, len(error), step):
        part = error[start : start + step]
        rest = part - up[start : start + step] @ down
        before += _energy(part, weigh)
        after += _energy(rest, weigh)
    return before, after


def _energy(part: Matrix, weigh: Matrix | None) -> float:
    weighed = part if weigh is None else _weighed(np.ascontiguousarray(part.T), weigh).T
    return float(np.einsum("ij,ij->", part, weighed, dtype=np.float64))


def live_nbytes(shape: tuple[int, int], rank: int) -> int:
    """What `best_factors` holds beside the error matrix, without H: an upper bound."""
    rows, columns = shape
    block = rank + _SPARE
    width = block * (_DEPTH + 1)
    if min(shape) <= max(_WHOLE, width):
        return (5 * rows * columns + 3 * min(shape) ** 2) * 8
    copies = 3 * width * 4 + 6 * block * 8  # of thin matrices; QR has float64 ones of a block
    return copies * (rows + columns) + 6 * width * width * 8
