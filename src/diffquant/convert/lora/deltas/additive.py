"""Kinds that add a matrix which is known without the weight: rows of it, a chunk at a time."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.lora.deltas.parts import Parts, Rows

__all__ = ["core_product", "hadamard", "kronecker", "low_rank", "table"]

Floats: TypeAlias = NDArray[np.float32]


def low_rank(parts: Parts, rows: Rows) -> Floats:
    """Rows of scale * up @ down, or with a core of scale * up @ core @ down."""
    up = parts.matrix("up", rows) * np.float32(parts.scale)
    return core_product(up, parts.matrix("down"), parts.read("mid") if "mid" in parts else None)


def core_product(left: Floats, right: Floats, core: Floats | None) -> Floats:
    """Left (R, r) @ right (r, K); with a core (r, r, ...) the tail of a kernel comes from that.

    Returns:
        (R, K), or (R, K * kernel), input channels before the kernel's axes.
    """
    if core is None:
        return left @ right
    rank = core.shape[0]
    inner = left @ core.reshape(rank, -1)  # (R, r * kernel)
    inner = inner.reshape(len(left), core.shape[1], -1)
    found = np.einsum("imk,mj->ijk", inner, right, optimize=True)
    return np.ascontiguousarray(found.reshape(len(left), -1))


def hadamard(parts: Parts, rows: Rows) -> Floats:
    """Rows of scale * (w1_a @ w1_b) * (w2_a @ w2_b); with cores w1_a and w2_a lie the other way."""
    found = _side(parts, rows, "1") * _side(parts, rows, "2")
    found *= np.float32(parts.scale)
    return found


def _side(parts: Parts, rows: Rows, which: str) -> Floats:
    core = parts.read(f"hada_t{which}") if f"hada_t{which}" in parts else None
    a, b = f"hada_w{which}_a", f"hada_w{which}_b"
    if core is None:
        return core_product(parts.matrix(a, rows), parts.matrix(b), None)
    left = parts.matrix(a)[:, slice(*rows)].T  # (r, n)
    return core_product(np.ascontiguousarray(left), parts.matrix(b), core)


def kronecker(parts: Parts, rows: Rows) -> Floats:
    """Rows of scale * kron(w1, w2): row i is w1[i // c] by w2[i % c], c the rows of w2."""
    one, two = _factor(parts, "1"), _factor(parts, "2")
    index = np.arange(*rows)
    left, right = one[index // len(two)], two[index % len(two)]  # (R, b), (R, d * kernel)
    left = left * np.float32(parts.scale)
    found = left[:, :, None] * right[:, None, :]
    return found.reshape(len(index), -1)


def _factor(parts: Parts, which: str) -> Floats:
    name = f"lokr_w{which}"
    if name in parts:
        return parts.matrix(name)
    core = f"lokr_t{which}"
    if core in parts:
        left = np.ascontiguousarray(parts.matrix(f"{name}_a").T)
        return core_product(left, parts.matrix(f"{name}_b"), parts.read(core))
    return parts.matrix(f"{name}_a") @ parts.matrix(f"{name}_b")


def table(parts: Parts, rows: Rows) -> Floats:
    """Rows of scale * (B @ A)^T: the tokens' vectors."""
    a, b = parts.matrix("embedding_a"), parts.matrix("embedding_b")  # (r, tokens), (width, r)
    return np.ascontiguousarray(a[:, slice(*rows)].T * np.float32(parts.scale)) @ b.T
