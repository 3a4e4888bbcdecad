"""IQ2_XXS: super-blocks of 256, 4-bit scales per 32, 8 magnitudes per 8-bit index; 2.0625 bits.

    offset  0       2
            d (f16) 8 times, for 32 weights each:
                    4 grid indices (u8), u32: 4 times 7 signs from bit 0 up, scale in bits 28-31
                    decoded = +-d * (scale + 1/2) / 4 * magnitude, the magnitude 8, 25 or 43

The eighth sign of eight makes their count of minus signs even. There is no mode without importance.
Source: ggml-quants.c quantize_row_iq2_xxs_impl, dequantize_row_iq2_xxs,
ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes
from diffquant.quant.codecs.iq_blocks import Stored, grid_codec, load_signs, store_signs
from diffquant.quant.codecs.iq_search import Found, scale_levels

__all__ = ["decode", "encode", "pack", "unpack"]

_F = np.float32


def pack(found: Found) -> Bytes:
    """Found super-blocks -> (B, 66)."""
    d, levels = scale_levels("iq2_xxs", found)
    words = np.concatenate([found.point.astype(np.uint8), store_signs(found.signs, levels)], axis=2)
    stored = np.where(found.used, words.reshape(-1, 64), np.uint8(0))
    return np.concatenate([fields.half_bytes(d), stored], axis=1)


def unpack(packed: Bytes) -> Stored:
    """(B, 66) -> scales, grid indices and signs."""
    words = packed[:, 2:].reshape(-1, 8, 8)
    signs, levels = load_signs(words[:, :, 4:])
    d = fields.halves(packed[:, :2]) * (_F(0.5) + levels) * _F(0.25)
    return Stored(d, words[:, :, :4].reshape(-1, 32).astype(np.int32), signs)


encode, decode = grid_codec("iq2_xxs", pack, unpack)
