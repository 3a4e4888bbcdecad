"""Q8_0: 32 weights, one half-precision scale, signed 8-bit levels.

    offset  0        2                   34
            d (f16)  32 levels (i8)            decoded = level * d,  d = amax / 127

Rounds half away from zero. Source: ggml-quants.c quantize_row_q8_0_ref, dequantize_row_q8_0,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec

__all__ = ["decode", "encode"]


def _encode(blocks: Float32) -> Bytes:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)  # (B, 1)
    level = fields.round_half_away(blocks * fields.inverse(scale))
    levels = level.astype(np.int8).view(np.uint8)  # (B, 32)
    return np.concatenate([fields.half_bytes(scale[:, 0]), levels], axis=1)


def _decode(packed: Bytes) -> Float32:
    levels = packed[:, 2:].view(np.int8).astype(np.float32)  # (B, 32)
    return levels * fields.halves(packed[:, :2])


encode, decode = row_codec(_encode, _decode)
