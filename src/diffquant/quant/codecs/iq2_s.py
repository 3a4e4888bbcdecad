"""IQ2_S: super-blocks of 256, 4-bit scales per 16, 8 magnitudes per 10-bit index; 2.5625 bits.

    offset  0       2              34              66                      74
            d (f16) 32 low bytes   32 bytes of     8 bytes of upper bits,  8 bytes of scales,
                    of indices     signs           4 pairs from bit 0 up   low nibble first
                    decoded = +-d * (scale + 1/2) / 4 * magnitude, the magnitude 8, 25 or 43

Source: ggml-quants.c quantize_row_iq2_s_impl, dequantize_row_iq2_s, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes
from diffquant.quant.codecs.iq_blocks import Stored, grid_codec, load_nibbles, store_nibbles
from diffquant.quant.codecs.iq_search import Found, scale_levels

__all__ = ["decode", "encode", "pack", "unpack"]

_F = np.float32
_PAIRS = np.arange(0, 8, 2, dtype=np.uint8)


def pack(found: Found) -> Bytes:
    """Found super-blocks -> (B, 82)."""
    d, levels = scale_levels("iq2_s", found)
    point = found.point.reshape(-1, 8, 4)
    upper = ((point >> 8).astype(np.uint8) << _PAIRS).sum(axis=2, dtype=np.uint8)
    low = (point & 255).astype(np.uint8).reshape(-1, 32)
    stored = (fields.half_bytes(d), low, found.signs.reshape(-1, 32), upper, store_nibbles(levels))
    return np.concatenate(stored, axis=1)


def unpack(packed: Bytes) -> Stored:
    """(B, 82) -> scales, grid indices and signs."""
    upper = (packed[:, 66:74, None] >> _PAIRS & np.uint8(3)).reshape(-1, 32)
    levels = load_nibbles(packed[:, 74:]).astype(np.float32)
    d = fields.halves(packed[:, :2]) * (_F(0.5) + levels) * _F(0.25)
    point = packed[:, 2:34].astype(np.int32) | upper.astype(np.int32) << 8
    return Stored(d, point, packed[:, 34:66])


encode, decode = grid_codec("iq2_s", pack, unpack)
