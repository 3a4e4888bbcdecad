"""Q5_K: super-blocks of 256, sub-blocks of 32 with 6-bit scale and minimum, 5-bit levels; 5.5 bits.

    offset  0                    16                     48
            header (k_affine.py)  32 bytes of fifth bits  128 bytes of nibbles

Nibbles as in Q4_K; bit j of fifth-bits byte l belongs to weight l of sub-block j.
Source: ggml-quants.c quantize_row_q5_K_ref, dequantize_row_q5_K, ggml-org/llama.cpp@01243c5.
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

TOP = 31
CLAMP = 63  # of scales with importance
CANDIDATES = Candidates(-0.5, 0.1, 15)


def _pack(header: Bytes, levels: Bytes) -> Bytes:
    fifth = np.packbits(levels >> 4, axis=1, bitorder="little")[:, 0]  # (B, 32)
    nibbles = levels[:, ::2] & 15 | levels[:, 1::2] << 4  # (B, 4, 32)
    return np.concatenate([header, fifth, nibbles.reshape(-1, 128)], axis=1)


def _encode(blocks: Float32) -> Bytes:
    return _pack(*encode_super_blocks(blocks, TOP, CANDIDATES))


def _encode_weighted(weight: Float32, importance: Float32) -> Bytes:
    return _pack(*encode_weighted(weight, importance, TOP, CLAMP))


def _decode(packed: Bytes) -> Float32:
    fifth = np.unpackbits(packed[:, None, 16:48], axis=1, bitorder="little")  # (B, 8, 32)
    nibbles = packed[:, 48:].reshape(-1, 4, 1, 32)
    levels = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(-1, 8, 32)
    return decode_super_blocks(packed[:, :16], levels | fifth << 4)


encode, decode = row_codec(_encode, _decode, _encode_weighted)
