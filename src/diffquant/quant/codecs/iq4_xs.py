"""IQ4_XS: super-blocks of 256, sub-blocks of 32 with 6-bit scale, IQ4_NL's levels; 4.25 bits.

    offset  0        2                4                     8                      136
            d (f16)  upper two bits   lower four bits of    128 bytes of nibbles
                     of 8 scales      8 scales              decoded = d * (s - 32) * VALUES[level]

The upper bits of scale j are bits 2 j and 2 j + 1 of a 16-bit word; the lower bits of scales 2 j
and 2 j + 1 are the low and the high nibble of byte 4 + j. Each sub-block owns 16 bytes of nibbles.
Scales and levels are searched against d before it is rounded to half precision.

Source: ggml-quants.c quantize_iq4_xs, dequantize_row_iq4_xs, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields, iq4_search
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec

__all__ = ["decode", "encode"]

_F = np.float32


def _encode(blocks: Float32, importance: Float32 | None = None) -> Bytes:
    x, weight = iq4_search.columns(blocks, importance)  # (32, 8 B)
    found = iq4_search.find_scale(x, weight).reshape(-1, 8)
    d = -fields.peak(found) / _F(32)  # (B, 1)
    steps = np.clip(fields.nearest_int(fields.inverse(d) * found), -32, 31)  # (B, 8)
    scale = (d * steps.astype(np.float32)).reshape(-1)
    levels = iq4_search.nearest_level(fields.inverse(scale) * x).T  # (8 B, 32)
    stored = (steps + 32).astype(np.uint8)
    upper = stored.reshape(-1, 2, 4) >> 4 << np.array([0, 2, 4, 6], np.uint8)
    packed = (
        fields.half_bytes(d[:, 0]),
        np.bitwise_or.reduce(upper, axis=2),
        stored[:, ::2] & 15 | stored[:, 1::2] << 4,
        fields.nibble_bytes(levels).reshape(-1, 128),
    )
    return np.concatenate(packed, axis=1)


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    spread = np.broadcast_to(importance, rows.shape).reshape(-1, 256)
    return _encode(rows.reshape(-1, 256), spread)


def _decode(packed: Bytes) -> Float32:
    shift = np.array([0, 2, 4, 6], np.uint8)
    upper = (packed[:, 2:4, None] >> shift & 3).reshape(-1, 8)
    lower = (packed[:, 4:8, None] >> shift[::2] & 15).reshape(-1, 8)
    steps = (lower | upper << 4).astype(np.float32) - _F(32)
    scale = (fields.halves(packed[:, :2]) * steps).reshape(-1, 1)  # (8 B, 1)
    values = iq4_search.VALUES[fields.nibbles(packed[:, 8:].reshape(-1, 16))]  # (8 B, 32)
    blocks: Float32 = scale * values
    return blocks.reshape(-1, 256)


encode, decode = row_codec(_encode, _decode, _encode_weighted)
