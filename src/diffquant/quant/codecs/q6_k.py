"""Q6_K: super-blocks of 256, sub-blocks of 16 with 8-bit scale, 6-bit levels; 6.5625 bits.

    offset  0                        128                     192                  208        210
            128 bytes of low nibbles  64 bytes of upper bits  16 scales (i8)       d (f16)
                                                             decoded = d * scale * (level - 32)

Each half of 128 weights owns 64 nibble bytes and 32 upper-bit bytes. With its weights as a..d, 32
each: nibble byte l is a[l] | c[l] << 4, byte 32 + l is b[l] | d[l] << 4, and byte l of the upper
bits holds two bits of each of a, b, c, d from the lowest up. An element's squared error counts by
its column's importance alone, without importance by the element squared. Source: ggml-quants.c
quantize_row_q6_K_ref, quantize_row_q6_K_impl, dequantize_row_q6_K, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import fields
from diffquant.quant.codecs.affine_search import columns_of
from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS, symmetric_search

__all__ = ["decode", "encode"]

_F = np.float32


def _encode(blocks: Float32) -> Bytes:
    return _pack(blocks, None)


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    weight = np.tile(columns_of(importance, 16), (1, len(rows)))  # (16, 16 B)
    return _pack(rows.reshape(-1, 256), weight)


def _pack(blocks: Float32, weight: Float32 | None) -> Bytes:
    x = columns_of(blocks, 16)  # (16, 16 B)
    found, searched = symmetric_search(x, 32, weight)
    found = found.reshape(-1, 16)
    most = fields.peak(found)  # (B, 1)
    empty = np.abs(most) < GROUP_MAX_EPS
    inverse = _F(-128) / most
    scales = np.minimum(fields.nearest_int(inverse * found), 127).astype(np.int8)  # (B, 16)
    half = fields.half_bytes((_F(1) / inverse)[:, 0])
    d = (fields.halves(half) * scales).reshape(-1)  # (16 B,)
    against = np.clip(fields.nearest_int(x / d), -32, 31) + 32
    levels = np.where(d != 0, against, searched).T.astype(np.uint8)
    a, b, c, e = levels.reshape(-1, 2, 4, 32).transpose(2, 0, 1, 3)  # (B, 2, 32) each
    low = np.stack([a & 15 | c << 4, b & 15 | e << 4], axis=2)
    upper = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6
    stored = (low.reshape(-1, 128), upper.reshape(-1, 64), scales.view(np.uint8), half)
    return np.where(empty, np.uint8(0), np.concatenate(stored, axis=1))


def _decode(packed: Bytes) -> Float32:
    low = packed[:, :128].reshape(-1, 2, 2, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2)  # (B, 2, 4, 32): a, b, c, d
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    upper = packed[:, 128:192].reshape(-1, 2, 1, 32) >> shift & 3
    levels = (nibbles | upper << 4).astype(np.float32) - _F(32)
    d = fields.halves(packed[:, 208:]) * packed[:, 192:208].view(np.int8)  # (B, 16)
    blocks: Float32 = d[:, :, None] * levels.reshape(-1, 16, 16)
    return blocks.reshape(-1, 256)


encode, decode = row_codec(_encode, _decode, _encode_weighted)
