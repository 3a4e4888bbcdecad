"""IQ3_XXS: super-blocks of 256, 4-bit scales per 32, 4 magnitudes per 8-bit index; 3.0625 bits.

    offset  0       2                  66
            d (f16) 64 indices (u8)    8 words (u32): 4 times 7 signs from bit 0 up, scale in 28-31
                    decoded = +-d * (scale + 1/2) / 2 * magnitude, one of 4, 12 .. 52, 62

The eighth sign of eight makes their count of minus signs even. Source: ggml-quants.c
quantize_row_iq3_xxs_impl, dequantize_row_iq3_xxs, ggml-org/llama.cpp@01243c5.
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
    """Found super-blocks -> (B, 98)."""
    d, levels = scale_levels("iq3_xxs", found)
    words = store_signs(found.signs, levels).reshape(-1, 32)
    stored = np.concatenate([found.point.reshape(-1, 64).astype(np.uint8), words], axis=1)
    stored = np.where(found.used, stored, np.uint8(0))
    return np.concatenate([fields.half_bytes(d), stored], axis=1)


def unpack(packed: Bytes) -> Stored:
    """(B, 98) -> scales, grid indices and signs."""
    signs, levels = load_signs(packed[:, 66:].reshape(-1, 8, 4))
    d = fields.halves(packed[:, :2]) * (_F(0.5) + levels) * _F(0.5)
    return Stored(d, packed[:, 2:66].astype(np.int32), signs)


encode, decode = grid_codec("iq3_xxs", pack, unpack)
