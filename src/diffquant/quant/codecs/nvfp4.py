"""NVFP4 as ggml stores it: 64 weights, an 8-bit float scale per 16, 4-bit floats; 4.5 bits.

    offset  0                   4                 36
            4 scales (ue4m3)    32 bytes of nibbles     decoded = scale / 2 * VALUES[level]

Each 16 weights own 8 bytes: weight j in the low, weight j + 8 in the high nibble of byte j. The
layout has no scale for the whole tensor; ComfyUI's nvfp4, which has one, is another format.

Read, not written. Source: ggml-common.h block_nvfp4, ggml-quants.c dequantize_row_nvfp4,
ggml-impl.h ggml_ue4m3_to_fp32, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.fp4 import UE4M3_HALVES, VALUES
from diffquant.quant.codecs.ggml_rows import row_codec

__all__ = ["decode"]


def _decode(packed: Bytes) -> Float32:
    nibbles = packed[:, 4:].reshape(-1, 4, 1, 8) >> np.array([0, 4], np.uint8)[:, None] & 15
    values = VALUES[nibbles.reshape(-1, 4, 16)]
    blocks: Float32 = UE4M3_HALVES[packed[:, :4]][:, :, None] * values
    return blocks.reshape(-1, 64)


_, decode = row_codec(None, _decode)
