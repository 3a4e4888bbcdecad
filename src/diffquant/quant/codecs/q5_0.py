"""Q5_0: 32 weights, one half-precision scale, 5-bit levels around 16.

    offset  0        2                   6                22
            d (f16)  fifth bits (u32)    16 bytes of nibbles     decoded = (level - 16) * d

As in q4_0 the element of largest magnitude gets level 0, or with importance lies near it. Source:
ggml-quants.c quantize_row_q5_0_ref, quantize_row_q5_0_impl, dequantize_row_q5_0,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.affine_search import columns_of, mean_squares, weigh
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.scale_search import symmetric_search

__all__ = ["decode", "encode"]


def _encode(blocks: Float32) -> Bytes:
    scale = fields.peak(blocks) / np.float32(-16)  # (B, 1)
    level = fields.truncate(blocks * fields.inverse(scale) + np.float32(16.5))
    levels = np.minimum(level, 31).astype(np.uint8)  # (B, 32)
    return _pack(scale[:, 0], levels)


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    x = columns_of(rows, 32)  # (32, B)
    scale, levels = symmetric_search(x, 16, weigh(x, importance, mean_squares(rows)))
    return _pack(scale, levels.T.astype(np.uint8))


def _pack(scale: Float32, levels: Bytes) -> Bytes:
    packed = (fields.half_bytes(scale), fields.fifth_bits(levels), fields.nibble_bytes(levels))
    return np.concatenate(packed, axis=1)


def _decode(packed: Bytes) -> Float32:
    levels = fields.nibbles(packed[:, 6:]) | fields.read_fifth_bits(packed[:, 2:6])  # (B, 32)
    return (levels.astype(np.float32) - np.float32(16)) * fields.halves(packed[:, :2])


encode, decode = row_codec(_encode, _decode, _encode_weighted)
