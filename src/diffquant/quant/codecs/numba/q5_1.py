"""Fast twin of codecs/q5_1.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import affine_blocks, blocks
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import truncate

__all__ = ["decode", "encode"]

_TOP = np.int32(31)
_LOW = np.int32(15)
_ROUND = np.float32(0.5)


@inlined
def _level(scaled: np.float32) -> np.int32:
    level = truncate(np.float32(scaled + _ROUND))
    return level if level < _TOP else _TOP


@kernel
def _encode_kernel(weight: Float32, packed: Bytes) -> None:
    for b in range(weight.shape[0]):
        least, most = blocks.spread(weight, b)
        scale = np.float32(np.float32(most - least) / np.float32(31))
        blocks.store_half(packed, b, 0, scale)
        blocks.store_half(packed, b, 2, least)
        inverse = blocks.inverse(scale)
        fifth = np.uint32(0)
        for j in range(16):
            low = _level(np.float32(np.float32(weight[b, j] - least) * inverse))
            high = _level(np.float32(np.float32(weight[b, 16 + j] - least) * inverse))
            fifth |= np.uint32(blocks.fifth_bit(low, j) | blocks.fifth_bit(high, 16 + j))
            packed[b, 8 + j] = np.uint8(np.int32(low & _LOW) | np.int32(high << np.int32(4)))
        blocks.store_word(packed, b, 4, fifth)


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        scale = blocks.load_half(packed, b, 0)
        least = blocks.load_half(packed, b, 2)
        fifth = blocks.load_word(packed, b, 4)
        for j in range(16):
            low = np.int32(packed[b, 8 + j] & np.uint8(15))
            high = np.int32(packed[b, 8 + j] >> np.uint8(4))
            low |= np.int32(np.uint32(fifth >> np.uint32(j)) & np.uint32(1)) << np.int32(4)
            high |= np.int32(np.uint32(fifth >> np.uint32(j + 16)) & np.uint32(1)) << np.int32(4)
            weight[b, j] = np.float32(np.float32(np.int32(low)) * scale) + least
            weight[b, 16 + j] = np.float32(np.float32(np.int32(high)) * scale) + least


encode, decode = row_codec(
    blocks.encoder(_encode_kernel, 24),
    blocks.decoder(_decode_kernel, 32),
    affine_blocks.weighted_encoder(24, 31),
)
