"""Q4_K: super-blocks of 256, sub-blocks of 32 with 6-bit scale and minimum, 4-bit levels; 4.5 bits.

    offset  0                    16
            header (k_affine.py)  128 bytes of nibbles

Byte 32 p + l holds weight l of sub-block 2 p in its low nibble, of sub-block 2 p + 1 in its high
one. Source: ggml-quants.c quantize_row_q4_K_ref, dequantize_row_q4_K, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.affine_search import Candidates
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.k_affine import (
    decode_super_blocks,
    encode_super_blocks,
    encode_weighted,
)

__all__ = ["CANDIDATES", "CLAMP", "TOP", "decode", "encode"]

TOP = 15
CLAMP = 255  # of scales with importance
CANDIDATES = Candidates(-1.0, 0.1, 20)


def _pack(header: Bytes, levels: Bytes) -> Bytes:
    nibbles = levels[:, ::2] | levels[:, 1::2] << 4  # (B, 4, 32)
    return np.concatenate([header, nibbles.reshape(-1, 128)], axis=1)


def _encode(blocks: Float32) -> Bytes:
    return _pack(*encode_super_blocks(blocks, TOP, CANDIDATES))


def _encode_weighted(weight: Float32, importance: Float32) -> Bytes:
    return _pack(*encode_weighted(weight, importance, TOP, CLAMP))


def _decode(packed: Bytes) -> Float32:
    nibbles = packed[:, 16:].reshape(-1, 4, 1, 32)
    levels = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(-1, 8, 32)
    return decode_super_blocks(packed[:, :16], levels)


encode, decode = row_codec(_encode, _decode, _encode_weighted)
