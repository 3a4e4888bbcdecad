"""Fast twin of codecs/double_quant.py: the blocks are the fast twins', their absmax are few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts
from diffquant.quant.codecs.double_quant import Mean, compress, expand
from diffquant.quant.codecs.flat_blocks import BLOCK_SIZE, SMALLEST_ABSMAX
from diffquant.quant.codecs.numba import fp4_bnb, nf4

__all__ = ["decode", "encode", "reduce"]

_PLAIN = {"nf4_dq": nf4, "fp4_dq": fp4_bnb}


def reduce(weight: Float32, stats: Mean | None = None, *, fmt: str) -> Mean:
    """Add the absmax of a chunk's blocks to a sum; see codecs/double_quant.py."""
    del fmt
    flat = weight.reshape(-1)
    full = flat.size - flat.size % BLOCK_SIZE
    blocks = flat[:full].reshape(-1, BLOCK_SIZE)
    absmax = np.maximum(blocks.max(axis=1, initial=0), -blocks.min(axis=1, initial=0))
    total, count = stats or (0.0, 0)
    total, count = total + float(absmax.sum(dtype=np.float64)), count + absmax.size
    if full < flat.size:
        last = np.maximum(np.abs(flat[full:]).max(), SMALLEST_ABSMAX)
        total, count = total + float(last), count + 1
    return total, count


def encode(weight: Float32, stats: Mean | None = None, *, fmt: str) -> Parts:
    """Quantize rows, and their absmax again; see codecs/double_quant.py."""
    parts = _PLAIN[fmt].encode(weight, fmt=fmt)
    total, count = stats or reduce(weight, fmt=fmt)
    return {**parts, **compress(parts["absmax"], np.float32(total / max(count, 1)))}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Decode absmax, then the numbers; see codecs/double_quant.py."""
    plain = {"weight": parts["weight"], "absmax": expand(parts)}
    weight: Float32 = _PLAIN[fmt].decode(plain, shape, fmt=fmt)
    return weight
