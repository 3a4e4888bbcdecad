"""TQ2_0: 256 weights of -1, 0, 1 or 2 times one half-precision scale; 2.0625 bits.

    offset  0                    64
            64 bytes of 2 bits   d (f16)     decoded = d * (level - 1)

Each half of 128 weights owns 32 bytes; bits 2 n and 2 n + 1 of byte i are weight 32 n + i.

Read, not written. Source: ggml-common.h block_tq2_0, ggml-quants.c dequantize_row_tq2_0,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec

__all__ = ["decode"]


def _decode(packed: Bytes) -> Float32:
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    levels = packed[:, :64].reshape(-1, 2, 1, 32) >> shift & 3  # (B, 2, 4, 32)
    return fields.halves(packed[:, 64:]) * (
        levels.reshape(-1, 256).astype(np.float32) - np.float32(1)
    )


_, decode = row_codec(None, _decode)
