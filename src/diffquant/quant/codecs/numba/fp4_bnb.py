"""Fast twin of codecs/fp4_bnb.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.fp4_bnb import BOUNDS, CODE, ORDER
from diffquant.quant.codecs.nf4 import BLOCK_SIZE, SMALLEST_ABSMAX
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits

__all__ = ["decode", "encode"]

_ONE = np.float32(1)
_BOUNDS = tuple(BOUNDS)
_ORDER = ORDER
_CODE = CODE


@inlined
def _code(scaled: np.float32) -> np.uint8:
    # How many bounds lie below: fifteen comparisons and no branch; NaN lies above all.
    index = np.int32(0)
    for bound in _BOUNDS:
        index = np.int32(index + np.int32(not bound >= scaled))
    return np.uint8(_ORDER[index])


@inlined
def _absmax(flat: Float32, start: int, stop: int) -> np.float32:
    bits = np.int32(0)
    for i in range(start, stop):
        size = magnitude_bits(flat[i])
        bits = size if size > bits else bits
    return np.int32(bits).view(np.float32)


@kernel
def _encode_kernel(flat: Float32, packed: Bytes, absmax: Float32) -> None:
    blocks = flat.size // BLOCK_SIZE
    for b in range(blocks):
        start = b * BLOCK_SIZE
        amax = _absmax(flat, start, start + BLOCK_SIZE)
        absmax[b] = amax
        inverse = np.float32(_ONE / (SMALLEST_ABSMAX if amax < SMALLEST_ABSMAX else amax))
        for i in range(BLOCK_SIZE // 2):
            high = _code(np.float32(flat[start + 2 * i] * inverse))
            low = _code(np.float32(flat[start + 2 * i + 1] * inverse))
            packed[start // 2 + i] = np.uint8((high << np.uint8(4)) | low)
    start = blocks * BLOCK_SIZE
    if start < flat.size:
        amax = _absmax(flat, start, flat.size)
        amax = SMALLEST_ABSMAX if amax < SMALLEST_ABSMAX else amax
        absmax[blocks] = amax
        for i in range(start // 2, packed.size):
            high = _code(np.float32(flat[2 * i] / amax))
            low = _code(np.float32(flat[2 * i + 1] / amax)) if 2 * i + 1 < flat.size else 0
            packed[i] = np.uint8((high << np.uint8(4)) | np.uint8(low))


@kernel
def _decode_kernel(packed: Bytes, absmax: Float32, flat: Float32) -> None:
    for b in range(absmax.size):
        start, amax = b * BLOCK_SIZE, absmax[b]
        for i in range(start // 2, min(start + BLOCK_SIZE, flat.size) // 2):
            flat[2 * i] = _CODE[packed[i] >> np.uint8(4)] * amax
            flat[2 * i + 1] = _CODE[packed[i] & np.uint8(15)] * amax
    if flat.size % 2:
        last = packed[packed.size - 1] >> np.uint8(4)
        flat[flat.size - 1] = _CODE[last] * absmax[absmax.size - 1]


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize rows to FP4; see codecs/fp4_bnb.py."""
    del stats, fmt
    packed = np.empty(-(-weight.size // 2), np.uint8)
    absmax = np.empty(-(-weight.size // BLOCK_SIZE), np.float32)
    _encode_kernel(frozen(weight, -1), packed, absmax)
    return {"weight": packed, "absmax": absmax}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look codes up and multiply by their block's absmax; see codecs/fp4_bnb.py."""
    del fmt
    flat = np.empty(math.prod(shape), np.float32)
    packed = frozen(parts["weight"], -(-flat.size // 2))
    _decode_kernel(packed, frozen(parts["absmax"], -(-flat.size // BLOCK_SIZE)), flat)
    return flat.reshape(shape)
