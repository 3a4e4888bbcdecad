"""Fast twin of codecs/mxfp8.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.mxfp8 import BLOCK_SIZE, PAD, SCALES
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits
from diffquant.quant.codecs.numba.fp8_e4m3 import e4m3_from_float
from diffquant.quant.codecs.swizzle import rounded_up, swizzle, unswizzle

__all__ = ["decode", "encode"]

_MAX = np.float32(448)
_SMALLEST = np.float32(2.0**-127)
_BIAS = np.float32(127)
_SCALES = SCALES
_VALUES = e4m3_table()
# Products with these are the quotients, bit for bit: both are powers of two. 0 is never used.
_INVERSES = np.ldexp(np.float64(1), 127 - np.arange(256)).astype(np.float32)


@inlined
def _exponent(amax: np.float32) -> np.uint8:
    needed = np.float32(amax / _MAX)
    needed = _SMALLEST if needed < _SMALLEST else needed
    whole = np.ceil(np.float32(np.log2(np.float64(needed))))
    # NaN takes the largest scale, as infinity does.
    return np.uint8(np.float32(whole + _BIAS)) if whole <= _BIAS else np.uint8(254)


@kernel
def _encode_kernel(weight: Float32, packed: Bytes, byte: Bytes) -> None:
    for r in range(weight.shape[0]):
        for c in range(byte.shape[1]):
            start = c * BLOCK_SIZE
            stop = min(start + BLOCK_SIZE, weight.shape[1])
            bits = np.int32(0)
            for k in range(start, stop):
                size = magnitude_bits(weight[r, k])
                bits = size if size > bits else bits
            exponent = _exponent(np.int32(bits).view(np.float32))
            byte[r, c] = exponent
            if exponent == np.uint8(0):
                continue
            inverse = _INVERSES[exponent]
            for k in range(start, stop):
                scaled = np.float32(weight[r, k] * inverse)
                scaled = _MAX if scaled > _MAX else scaled
                packed[r, k] = e4m3_from_float(-_MAX if scaled < -_MAX else scaled)


@kernel
def _decode_kernel(packed: Bytes, byte: Bytes, weight: Float32) -> None:
    for r in range(weight.shape[0]):
        for c in range(byte.shape[1]):
            start = c * BLOCK_SIZE
            scale = _SCALES[byte[r, c]]
            for k in range(start, min(start + BLOCK_SIZE, weight.shape[1])):
                weight[r, k] = _VALUES[packed[r, k]] * scale


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round blocks of 32 to E4M3 times a power of two; see codecs/mxfp8.py."""
    del stats, fmt
    high, wide = (rounded_up(length, PAD) for length in weight.shape)
    packed = np.zeros((high, wide), np.uint8)
    byte = np.zeros((high, wide // BLOCK_SIZE), np.uint8)
    _encode_kernel(frozen(weight, weight.shape), packed, byte)
    return {"weight": packed, "block_scale": swizzle(byte)}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply values by their block's scale; see codecs/mxfp8.py."""
    del fmt
    high, wide = (rounded_up(length, PAD) for length in shape)
    weight = np.empty(shape, np.float32)
    byte = unswizzle(parts["block_scale"], high, wide // BLOCK_SIZE)
    packed = frozen(parts["weight"], (high, wide))
    _decode_kernel(packed, frozen(byte, byte.shape), weight)
    return weight
