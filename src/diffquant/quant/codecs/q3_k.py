"""Q3_K: super-blocks of 256, sub-blocks of 16 with 6-bit scale, 3-bit levels; 3.4375 bits.

    offset  0                  32                    96                   108        110
            32 bytes of third  64 bytes of lower     12 bytes of scales   d (f16)
            bits               two bits
                                       decoded = d * (scale - 32) * (level - 4)

Bit n of third-bit byte l belongs to weight 32 n + l. Each half of 128 weights owns 32 bytes of
lower bits; byte l holds two bits of each of weights l, l + 32, l + 64, l + 96 of the half, from the
lowest up. The low four bits of scales 0-7 and 8-15 are the low and high nibbles of scale bytes 0-7;
byte 8 + l holds the upper two bits of scales l, l + 4, l + 8, l + 12, from the lowest up.

Without importance the levels of a sub-block are found by descent, with importance on a grid of
candidates, and the sixteen scales are then fitted by the same grid search. Source: ggml-quants.c
quantize_row_q3_K_ref, quantize_row_q3_K_impl, dequantize_row_q3_K, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.affine_search import columns_of, mean_squares, weigh
from diffquant.quant.codecs.arrays import Bytes, Float32, Int32
from diffquant.quant.codecs.descent_search import descent_search
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.scale_search import sum_rows, symmetric_search

__all__ = ["decode", "encode"]

_F = np.float32
_HALF = 4
_HALF_SCALE = 32


def _encode(blocks: Float32) -> Bytes:
    x = columns_of(blocks, 16)  # (16, 16 B)
    found, searched = descent_search(x, _HALF)
    found = found.reshape(-1, 16)
    most = fields.peak(found)  # (B, 1)
    inverse = _F(-_HALF_SCALE) / most
    scales = np.clip(fields.nearest_int(inverse * found), -_HALF_SCALE, _HALF_SCALE - 1)
    empty = most == 0
    scales = np.where(empty, 0, scales + _HALF_SCALE)
    return _pack(x, np.where(empty, _F(0), _F(1) / inverse)[:, 0], scales, searched)


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    x = columns_of(rows, 16)  # (16, 16 B)
    weight = weigh(x, importance, mean_squares(rows.reshape(-1, 256), 2))
    found, searched = symmetric_search(x, _HALF, weight)
    by_block = found.reshape(-1, 16).T  # (16, B): the scales are fitted like elements
    total = sum_rows(weight).reshape(-1, 16).T
    d, scales = symmetric_search(by_block, _HALF_SCALE, total)
    return _pack(x, d, scales.T, searched)


def _pack(x: Float32, d: Float32, scales: Int32, searched: Int32) -> Bytes:
    """Round to the stored scales; where one decodes to 0 the levels that were searched stay.

    Args:
        x: (16, 16 B) sub-blocks in columns.
        d: (B,) step of the scales.
        scales: (B, 16) in 0..63.
        searched: (16, 16 B) levels in 0..7.
    """
    half = fields.half_bytes(d)
    step = (fields.halves(half) * (scales - _HALF_SCALE).astype(np.float32)).reshape(-1)
    against = np.clip(fields.nearest_int(x / step), -_HALF, _HALF - 1) + _HALF
    levels = np.where(step != 0, against, searched).T.astype(np.uint8).reshape(-1, 256)
    third = np.packbits(levels.reshape(-1, 8, 32) >> 2, axis=1, bitorder="little")
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    lower = np.bitwise_or.reduce((levels.reshape(-1, 2, 4, 32) & 3) << shift, axis=2)
    scale = scales.astype(np.uint8)
    nibbles = scale[:, :8] & 15 | scale[:, 8:] << 4
    upper = np.bitwise_or.reduce(scale.reshape(-1, 4, 4) >> 4 << shift, axis=1)
    stored = (third.reshape(-1, 32), lower.reshape(-1, 64), nibbles, upper, half)
    return np.concatenate(stored, axis=1)


def _decode(packed: Bytes) -> Float32:
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    third = np.unpackbits(packed[:, None, :32], axis=1, bitorder="little")  # (B, 8, 32)
    lower = packed[:, 32:96].reshape(-1, 2, 1, 32) >> shift & 3  # (B, 2, 4, 32)
    levels = (third << 2 | lower.reshape(-1, 8, 32)).astype(np.float32) - _F(_HALF)
    nibbles = np.concatenate([packed[:, 96:104] & 15, packed[:, 96:104] >> 4], axis=1)
    upper = packed[:, None, 104:108] >> shift & 3  # (B, 4, 4)
    scales = (nibbles | upper.reshape(-1, 16) << 4).astype(np.float32) - _F(_HALF_SCALE)
    d = fields.halves(packed[:, 108:]) * scales  # (B, 16)
    blocks: Float32 = d[:, :, None] * levels.reshape(-1, 16, 16)
    return blocks.reshape(-1, 256)


encode, decode = row_codec(_encode, _decode, _encode_weighted)
