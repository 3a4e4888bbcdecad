"""IQ1_M: super-blocks of 256, sub-blocks of 16 with 3-bit scale, ternary vectors; 1.75 bits.

    offset  0                        32                     48
            lower eight bits of 32   16 bytes, a nibble     4 words of 16 bits, each with the
            grid indices             per index: upper       scales of 4 sub-blocks in bits 0-11;
                                     three bits, and the    bits 12-15 of all four words are d
                                     sign of the shift      (f16), lowest nibble first

    decoded = d * (2 s + 1) * (grid[index] + shift), shift = 1/8 or -1/8

Read, not written. Source: ggml-common.h block_iq1_m, ggml-quants.c dequantize_row_iq1_m,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.grids import grid
from diffquant.quant.codecs.iq1_s import SHIFT

__all__ = ["decode"]


def _decode(packed: Bytes) -> Float32:
    words = np.ascontiguousarray(packed[:, 48:]).view("<u2")  # (B, 4)
    quarters = words >> 12 << np.array([0, 4, 8, 12], np.uint16)
    d = np.bitwise_or.reduce(quarters, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    steps = (words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7) * 2 + 1  # (B, 4, 4)
    scale = d * steps.reshape(-1, 16).astype(np.float32)
    nibbles = (packed[:, 32:48, None] >> np.array([0, 4], np.uint8) & 15).astype(np.uint16)
    index = packed[:, :32].reshape(-1, 16, 2) | (nibbles & 7) << 8
    shift = np.where(nibbles >> 3, -SHIFT, SHIFT)  # (B, 16, 2)
    vectors = grid("iq1_m")[index] + shift[:, :, :, None]  # (B, 16, 2, 8)
    blocks: Float32 = scale[:, :, None, None] * vectors
    return blocks.reshape(-1, 256)


_, decode = row_codec(None, _decode)
