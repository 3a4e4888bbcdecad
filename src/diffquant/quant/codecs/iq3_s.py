"""IQ3_S: super-blocks of 256, 4-bit scales per 32, 4 magnitudes per 9-bit index; 3.4375 bits.

    offset  0       2              66                74               106
            d (f16) 64 low bytes   8 bytes of        32 bytes of      4 bytes of scales,
                    of indices     ninth bits        signs            low nibble first
                    decoded = +-d * (2 scale + 1) * magnitude, one of 1, 3 .. 15

Where a sub-block is all zeros, ggml writes nothing and moves on in its ninth bits and scales, not
in its indices and signs: those of later sub-blocks stand where the empty one's belong. Such a block
decodes wrongly, here as in ggml; bytes are kept equal to ggml's. Source: ggml-quants.c
quantize_row_iq3_s_impl, dequantize_row_iq3_s, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.arrays import Bytes
from diffquant.quant.codecs.iq_blocks import Stored, grid_codec, load_nibbles, store_nibbles
from diffquant.quant.codecs.iq_search import Found, scale_levels

__all__ = ["decode", "encode", "pack", "unpack"]

_BITS = np.arange(8, dtype=np.uint8)


def pack(found: Found) -> Bytes:
    """Found super-blocks -> (B, 110)."""
    d, levels = scale_levels("iq3_s", found)
    ninth = np.packbits(found.point > 255, axis=2, bitorder="little")[:, :, 0]
    # Indices and signs of empty sub-blocks go last: the others move up into their places.
    order = np.argsort(found.empty, axis=1, kind="stable")[:, :, None]
    low = np.take_along_axis((found.point & 255).astype(np.uint8), order, axis=1)
    signs = np.take_along_axis(found.signs, order, axis=1)
    stored = (
        fields.half_bytes(d),
        low.reshape(-1, 64),
        ninth,
        signs.reshape(-1, 32),
        store_nibbles(levels),
    )
    return np.concatenate(stored, axis=1)


def unpack(packed: Bytes) -> Stored:
    """(B, 110) -> scales, grid indices and signs."""
    ninth = packed[:, 66:74, None] >> _BITS & np.uint8(1)  # (B, 8, 8)
    levels = load_nibbles(packed[:, 106:]).astype(np.float32)
    d = fields.halves(packed[:, :2]) * (np.float32(1) + np.float32(2) * levels)
    point = packed[:, 2:66].astype(np.int32) | ninth.reshape(-1, 64).astype(np.int32) << 8
    return Stored(d, point, packed[:, 74:106])


encode, decode = grid_codec("iq3_s", pack, unpack)
