"""Q4_1: 32 weights, half-precision scale and minimum, 4-bit levels.

    offset  0        2        4                20
            d (f16)  m (f16)  16 bytes of nibbles     decoded = level * d + m

Source: ggml-quants.c quantize_row_q4_1_ref, with importance quantize_row_q4_1_impl;
dequantize_row_q4_1; ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.affine_search import weighted_blocks
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec

__all__ = ["decode", "encode"]


def _encode(blocks: Float32) -> Bytes:
    low, high = fields.spread(blocks)  # (B, 1)
    scale = (high - low) / np.float32(15)
    level = fields.truncate((blocks - low) * fields.inverse(scale) + np.float32(0.5))
    levels = np.minimum(level, 15).astype(np.uint8)
    return _pack(scale[:, 0], low[:, 0], levels)


def _encode_weighted(weight: Float32, importance: Float32) -> Bytes:
    return _pack(*weighted_blocks(weight, importance, 15))


def _pack(scale: Float32, low: Float32, levels: Bytes) -> Bytes:  # (B,), (B,), (B, 32)
    packed = (
        fields.half_bytes(scale),
        fields.half_bytes(low),
        fields.nibble_bytes(levels),
    )
    return np.concatenate(packed, axis=1)


def _decode(packed: Bytes) -> Float32:
    levels = fields.nibbles(packed[:, 4:]).astype(np.float32)  # (B, 32)
    return levels * fields.halves(packed[:, :2]) + fields.halves(packed[:, 2:4])


encode, decode = row_codec(_encode, _decode, _encode_weighted)
