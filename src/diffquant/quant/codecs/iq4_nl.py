"""IQ4_NL: 32 weights, half-precision scale, 16 levels that are not evenly spaced.

    offset  0        2                18
            d (f16)  16 bytes of nibbles     decoded = d * VALUES[level]

Source: ggml-quants.c quantize_iq4_nl, dequantize_row_iq4_nl, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields, iq4_search
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec

__all__ = ["decode", "encode"]


def _encode(blocks: Float32, importance: Float32 | None = None) -> Bytes:
    x, weight = iq4_search.columns(blocks, importance)
    scale = iq4_search.find_scale(x, weight)  # (B,)
    levels = iq4_search.nearest_level(fields.inverse(scale) * x).T  # (B, 32)
    return np.concatenate([fields.half_bytes(scale), fields.nibble_bytes(levels)], axis=1)


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    spread = np.broadcast_to(importance, rows.shape).reshape(-1, 32)
    return _encode(rows.reshape(-1, 32), spread)


def _decode(packed: Bytes) -> Float32:
    return fields.halves(packed[:, :2]) * iq4_search.VALUES[fields.nibbles(packed[:, 2:])]


encode, decode = row_codec(_encode, _decode, _encode_weighted)
