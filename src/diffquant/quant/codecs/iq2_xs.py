"""IQ2_XS: super-blocks of 256, 4-bit scales per 16, 8 magnitudes per 9-bit index; 2.3125 bits.

    offset  0       2                                             66
            d (f16) 32 words (u16): grid index | 7 signs << 9     8 bytes of scales, low first
                    decoded = +-d * (scale + 1/2) / 4 * magnitude, the magnitude 8, 25 or 43

The eighth sign of eight makes their count of minus signs even. There is no mode without importance.
Source: ggml-quants.c quantize_row_iq2_xs_impl, dequantize_row_iq2_xs, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes
from diffquant.quant.codecs.grids import even_signs
from diffquant.quant.codecs.iq_blocks import Stored, grid_codec, load_nibbles, store_nibbles
from diffquant.quant.codecs.iq_search import Found, scale_levels

__all__ = ["decode", "encode", "pack", "unpack"]

_F = np.float32


def pack(found: Found) -> Bytes:
    """Found super-blocks -> (B, 74)."""
    d, levels = scale_levels("iq2_xs", found)
    signs = (found.signs & np.uint8(127)).astype(np.uint16) << np.uint16(9)
    words = (found.point.astype(np.uint16) | signs).reshape(-1, 32)
    words = np.where(found.used, words, np.uint16(0))
    stored = (fields.half_bytes(d), words.astype("<u2").view(np.uint8), store_nibbles(levels))
    return np.concatenate(stored, axis=1)


def unpack(packed: Bytes) -> Stored:
    """(B, 74) -> scales, grid indices and signs."""
    words = np.ascontiguousarray(packed[:, 2:66]).view("<u2")
    levels = load_nibbles(packed[:, 66:]).astype(np.float32)
    d = fields.halves(packed[:, :2]) * (_F(0.5) + levels) * _F(0.25)
    return Stored(d, (words & 511).astype(np.int32), even_signs()[words >> 9])


encode, decode = grid_codec("iq2_xs", pack, unpack)
