"""Fast twin of codecs/q8_0.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits, round_half_away

__all__ = ["decode", "encode"]

_LEVELS = np.float32(127)


@kernel
def _encode_kernel(weight: Float32, packed: Bytes) -> None:
    for b in range(weight.shape[0]):
        bits = np.int32(0)
        for j in range(32):
            size = magnitude_bits(weight[b, j])
            bits = size if size > bits else bits
        scale = np.float32(np.int32(bits).view(np.float32) / _LEVELS)
        blocks.store_half(packed, b, 0, scale)
        inverse = blocks.inverse(scale)
        for j in range(32):
            packed[b, 2 + j] = np.uint8(round_half_away(np.float32(weight[b, j] * inverse)))


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        scale = blocks.load_half(packed, b, 0)
        for j in range(32):
            weight[b, j] = np.float32(np.int8(packed[b, 2 + j])) * scale


encode, decode = row_codec(blocks.encoder(_encode_kernel, 34), blocks.decoder(_decode_kernel, 32))
