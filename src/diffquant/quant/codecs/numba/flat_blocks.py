"""Fast pieces of codecs/flat_blocks.py that tables of codes share.

The encoding loop stands with each table (nf4.py, fp4_bnb.py), whose bounds are its constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.flat_blocks import BLOCK_SIZE
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits

__all__ = ["absmax_of", "decode_flat", "encode_flat"]


@inlined
def absmax_of(flat: Float32, start: int, stop: int) -> np.float32:
    """Largest magnitude of some elements; NaN where there is one."""
    bits = np.int32(0)
    for i in range(start, stop):
        size = magnitude_bits(flat[i])
        bits = size if size > bits else bits
    return np.int32(bits).view(np.float32)


@kernel
def _decode_kernel(packed: Bytes, absmax: Float32, table: Float32, flat: Float32) -> None:
    for b in range(absmax.size):
        start, amax = b * BLOCK_SIZE, absmax[b]
        for i in range(start // 2, min(start + BLOCK_SIZE, flat.size) // 2):
            flat[2 * i] = table[packed[i] >> np.uint8(4)] * amax
            flat[2 * i + 1] = table[packed[i] & np.uint8(15)] * amax
    if flat.size % 2:
        last = packed[packed.size - 1] >> np.uint8(4)
        flat[flat.size - 1] = table[last] * absmax[absmax.size - 1]


def encode_flat(weight: Float32, run: Callable[[Float32, Bytes, Float32], None]) -> Parts:
    """Make room for the parts of a weight and let a kernel fill it."""
    packed = np.empty(-(-weight.size // 2), np.uint8)
    absmax = np.empty(-(-weight.size // BLOCK_SIZE), np.float32)
    run(frozen(weight, -1), packed, absmax)
    return {"weight": packed, "absmax": absmax}


def decode_flat(
    parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], table: Float32
) -> Float32:
    """Look codes up and multiply by their block's absmax; see codecs/flat_blocks.py."""
    flat = np.empty(math.prod(shape), np.float32)
    packed = frozen(parts["weight"], -(-flat.size // 2))
    absmax = frozen(parts["absmax"], -(-flat.size // BLOCK_SIZE))
    _decode_kernel(packed, absmax, table, flat)
    return flat.reshape(shape)
