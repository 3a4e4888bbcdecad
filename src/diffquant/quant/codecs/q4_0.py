"""Q4_0: 32 weights, one half-precision scale, 4-bit levels around 8.

    offset  0        2                18
            d (f16)  16 bytes of nibbles     decoded = (level - 8) * d

The scale is the signed element of largest magnitude over -8, so that element is met exactly at
level 0 (before d is rounded to half precision). With importance, scale and levels come from a
search over grids near that one. Source: ggml-quants.c quantize_row_q4_0_ref,
quantize_row_q4_0_impl, dequantize_row_q4_0, ggml-org/llama.cpp@01243c5.
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
    scale = fields.peak(blocks) / np.float32(-8)  # (B, 1)
    level = fields.truncate(blocks * fields.inverse(scale) + np.float32(8.5))
    levels = np.minimum(level, 15).astype(np.uint8)  # (B, 32)
    return _pack(scale[:, 0], levels)


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    x = columns_of(rows, 32)  # (32, B)
    scale, levels = symmetric_search(x, 8, weigh(x, importance, mean_squares(rows)))
    return _pack(scale, levels.T.astype(np.uint8))


def _pack(scale: Float32, levels: Bytes) -> Bytes:
    return np.concatenate([fields.half_bytes(scale), fields.nibble_bytes(levels)], axis=1)


def _decode(packed: Bytes) -> Float32:
    levels = fields.nibbles(packed[:, 2:]).astype(np.float32)  # (B, 32)
    return (levels - np.float32(8)) * fields.halves(packed[:, :2])


encode, decode = row_codec(_encode, _decode, _encode_weighted)
