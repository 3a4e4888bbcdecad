"""Q5_0: 32 weights, one half-precision scale, 5-bit levels around 16.

    offset  0        2                   6                22
            d (f16)  fifth bits (u32)    16 bytes of nibbles     decoded = (level - 16) * d

Source: ggml-quants.c quantize_row_q5_0_ref, dequantize_row_q5_0, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec

__all__ = ["decode", "encode"]


def _encode(blocks: Float32) -> Bytes:
    scale = fields.peak(blocks) / np.float32(-16)  # (B, 1)
    level = fields.truncate(blocks * fields.inverse(scale) + np.float32(16.5))
    levels = np.minimum(level, 31).astype(np.uint8)  # (B, 32)
    packed = (
        fields.half_bytes(scale[:, 0]),
        fields.fifth_bits(levels),
        fields.nibble_bytes(levels),
    )
    return np.concatenate(packed, axis=1)


def _decode(packed: Bytes) -> Float32:
    levels = fields.nibbles(packed[:, 6:]) | fields.read_fifth_bits(packed[:, 2:6])  # (B, 32)
    return (levels.astype(np.float32) - np.float32(16)) * fields.halves(packed[:, :2])


encode, decode = row_codec(_encode, _decode)
