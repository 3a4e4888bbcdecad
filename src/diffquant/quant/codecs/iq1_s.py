"""IQ1_S: super-blocks of 256, sub-blocks of 32 with 3-bit scale, ternary vectors; 1.5625 bits.

    offset  0        2                        34
            d (f16)  lower eight bits of 32   8 words of 16 bits, one per sub-block:
                     grid indices             bits 0-11  upper three bits of 4 indices
                                              bits 12-14 scale s, bit 15 sign of the shift

    decoded = d * (2 s + 1) * (grid[index] + shift), shift = 1/8 or -1/8

Read, not written. Source: ggml-common.h block_iq1_s, ggml-quants.c dequantize_row_iq1_s,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.grids import grid

__all__ = ["SHIFT", "decode"]

SHIFT = np.float32(0.125)


def _decode(packed: Bytes) -> Float32:
    words = np.ascontiguousarray(packed[:, 34:]).view("<u2")  # (B, 8)
    upper = words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7  # (B, 8, 4)
    index = packed[:, 2:34].reshape(-1, 8, 4) | upper << 8
    steps = (words >> 12 & 7) * 2 + 1  # (B, 8)
    scale = fields.halves(packed[:, :2]) * steps.astype(np.float32)
    shift = np.where(words >> 15, -SHIFT, SHIFT)
    vectors = grid("iq1_s")[index] + shift[:, :, None, None]  # (B, 8, 4, 8)
    blocks: Float32 = scale[:, :, None, None] * vectors
    return blocks.reshape(-1, 256)


_, decode = row_codec(None, _decode)
