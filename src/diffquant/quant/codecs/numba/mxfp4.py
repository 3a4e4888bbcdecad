"""Fast twin of codecs/mxfp4.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.fp4 import E8M0_HALVES, MIDPOINTS, VALUES
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits, truncate

__all__ = ["decode", "encode"]

_NBYTES = 17
_BIAS = np.int32(125)
_ZERO = np.float32(0)
_SCALES = E8M0_HALVES
_VALUES = VALUES
_B0, _B1, _B2, _B3, _B4, _B5, _B6 = MIDPOINTS


@inlined
def _exponent(weight: Float32, b: int) -> np.uint8:
    largest = np.int32(0)
    for i in range(weight.shape[1]):
        bits = magnitude_bits(weight[b, i])
        largest = bits if bits > largest else largest
    if largest == np.int32(0):
        return np.uint8(0)
    most = np.int32(largest).view(np.float32)
    whole = truncate(np.floor(np.float32(np.log2(np.float64(most)))))
    return np.uint8(np.int32(whole + _BIAS))


@inlined
def _level(value: np.float32, scale: np.float32) -> np.int32:
    # Products with a power of two are exact.
    size = np.float32(abs(value))
    level = np.int32(np.int32(size > _B0 * scale) + np.int32(size > _B1 * scale))
    level = np.int32(level + np.int32(size > _B2 * scale) + np.int32(size > _B3 * scale))
    level = np.int32(level + np.int32(size > _B4 * scale) + np.int32(size > _B5 * scale))
    level = np.int32(level + np.int32(size > _B6 * scale))
    negative = np.int32(np.int32(value < _ZERO) & np.int32(level > np.int32(0)))
    return np.int32(level | np.int32(negative << np.int32(3)))


@kernel
def _encode_kernel(weight: Float32, packed: Bytes) -> None:
    for b in range(weight.shape[0]):
        exponent = _exponent(weight, b)
        packed[b, 0] = exponent
        scale = _SCALES[exponent]
        for i in range(16):
            low = _level(weight[b, i], scale)
            high = _level(weight[b, 16 + i], scale)
            packed[b, 1 + i] = np.uint8(low | np.int32(high << np.int32(4)))


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        scale = _SCALES[packed[b, 0]]
        for i in range(16):
            byte = packed[b, 1 + i]
            weight[b, i] = _VALUES[byte & np.uint8(15)] * scale
            weight[b, 16 + i] = _VALUES[byte >> np.uint8(4)] * scale


encode, decode = row_codec(
    blocks.encoder(_encode_kernel, _NBYTES), blocks.decoder(_decode_kernel, 32)
)
