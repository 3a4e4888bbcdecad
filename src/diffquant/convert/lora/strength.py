"""How large an adapter's change is: the Frobenius norm of its delta at weight 1.

A product's norm follows from the small Gram matrices of its factors, a Kronecker product's from
the norms of its own: no delta is formed but LoHa's.

    |up @ down|^2 = sum((up^T up) * (down down^T))        |kron(a, b)| = |a| |b|
"""

from __future__ import annotations

import math

import numpy as np

from diffquant.convert.lora.group import Adapter
from diffquant.convert.lora.pairs import Matrix, read_pair, read_part, scale_of
from diffquant.core.tensors import TensorSource

__all__ = ["delta_norm", "product_norm"]


def product_norm(up: Matrix, down: Matrix) -> float:
    """Frobenius norm of up (N, r) @ down (r, K)."""
    left = up.T.astype(np.float64) @ up
    right = down.astype(np.float64) @ down.T
    return math.sqrt(max(float((left * right).sum()), 0.0))


def delta_norm(source: TensorSource, adapter: Adapter) -> float | None:
    """Norm of what an adapter adds to its weight; None for kinds that need the weight to tell.

    Raises:
        MalformedFile: NaN or infinity in its parts.
    """
    roles = adapter.parts.keys()
    if {"magnitude", "mid", "hada_t1", "lokr_t1", "lokr_t2"} & roles:
        return None
    if adapter.kind == "lora":
        pair = read_pair(source, adapter)
        return abs(pair.scale) * product_norm(pair.up, pair.down)
    if adapter.kind == "lokr":
        # alpha counts only where a factor has a rank: lycoris-lora 4.1.3, modules/lokr.py
        return abs(scale_of(adapter)) * math.prod(
            _factor_norm(source, adapter, name) for name in ("lokr_w1", "lokr_w2")
        )
    if adapter.kind == "loha":
        one, two = (
            read_part(source, adapter, f"hada_{name}_a")
            @ read_part(source, adapter, f"hada_{name}_b")
            for name in ("w1", "w2")
        )
        return abs(scale_of(adapter)) * float(np.linalg.norm(one * two))
    if adapter.kind == "full" and "diff" in roles:
        return float(np.linalg.norm(read_part(source, adapter, "diff")))
    return None


def _factor_norm(source: TensorSource, adapter: Adapter, name: str) -> float:
    if name in adapter.parts:
        return float(np.linalg.norm(read_part(source, adapter, name)))
    a, b = (read_part(source, adapter, f"{name}_{half}") for half in "ab")
    return product_norm(a, b.reshape(len(b), -1))
