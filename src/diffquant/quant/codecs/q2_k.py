"""Q2_K: super-blocks of 256, sub-blocks of 16 with 4-bit scale and minimum, 2-bit levels.

    offset  0                       16                      80       82
            16 x (scale | min << 4)  64 bytes of four levels  d (f16)  dmin (f16)

decoded = d * scale * level - dmin * min; 2.625 bits per weight. Byte l of the first 32 level bytes
holds, from the lowest bits up, weights l, l + 32, l + 64, l + 96; the other 32 bytes hold the
second half in the same way. Source: ggml-quants.c quantize_row_q2_K_ref, with importance
quantize_row_q2_K_impl; dequantize_row_q2_K; ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import affine_search, fields
from diffquant.quant.codecs.affine_search import WEIGHTED, Candidates, columns_of
from diffquant.quant.codecs.arrays import Bytes, Float32, Int32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.scale_search import sum_rows

__all__ = ["CANDIDATES", "decode", "encode"]

CANDIDATES = Candidates(-0.5, 0.1, 15)
_F = np.float32


def _four_bits(values: Float32) -> tuple[Float32, Bytes]:
    """(B, 16) -> the size of a step (B,) and steps (B, 16): the largest is 15 steps."""
    most = np.maximum(values.max(axis=1), _F(0))
    steps = fields.nearest_int((_F(15) / most)[:, None] * values).astype(np.uint8)
    return most / _F(15), np.where(most[:, None] > 0, steps, np.uint8(0))


def _encode(blocks: Float32) -> Bytes:
    x = columns_of(blocks, 16)  # (16, 16 B)
    scale, low, levels = affine_search.affine_search(x, np.abs(x), 3, CANDIDATES, absolute=True)
    return _pack(x, levels, _four_bits(scale.reshape(-1, 16)), _four_bits(low.reshape(-1, 16)))


def _encode_weighted(weight: Float32, importance: Float32) -> Bytes:
    x = columns_of(weight, 16)  # (16, 16 B)
    sigma2 = affine_search.mean_squares(weight.reshape(-1, 256))
    weights = affine_search.weigh(x, importance, sigma2)
    scale, low, levels = affine_search.affine_search(x, weights, 3, WEIGHTED)
    sums = sum_rows(weights).reshape(-1, 16).T
    d, scales = affine_search.positive_search(scale.reshape(-1, 16).T, sums, 15)
    dmin, lows = affine_search.positive_search(low.reshape(-1, 16).T, sums, 15)
    return _pack(x, levels, (d, scales.T), (dmin, lows.T))


def _pack(
    x: Float32, searched: Int32, scale: tuple[Float32, Bytes], low: tuple[Float32, Bytes]
) -> Bytes:
    """Store steps, and take levels against what was stored."""
    fours = scale[1] | low[1] << 4  # (B, 16)
    halves = fields.half_bytes(scale[0]), fields.half_bytes(low[0])
    d: Float32 = (fields.halves(halves[0]) * (fours & 15)).reshape(-1)  # (16 B,)
    minimum: Float32 = (fields.halves(halves[1]) * (fours >> 4)).reshape(-1)
    against = np.clip(fields.nearest_int((x + minimum) / d), 0, 3)
    levels = np.where(d != 0, against, searched).T.astype(np.uint8)
    a, b, c, e = levels.reshape(-1, 2, 4, 32).transpose(2, 0, 1, 3)  # (B, 2, 32) each
    quarters = a | b << 2 | c << 4 | e << 6
    return np.concatenate([fours, quarters.reshape(-1, 64), *halves], axis=1)


def _decode(packed: Bytes) -> Float32:
    d = fields.halves(packed[:, 80:82]) * (packed[:, :16] & 15)  # (B, 16)
    minimum = fields.halves(packed[:, 82:]) * (packed[:, :16] >> 4)
    shift = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    levels = packed[:, 16:80].reshape(-1, 2, 1, 32) >> shift & 3  # (B, 2, 4, 32)
    spread = levels.reshape(-1, 16, 16).astype(np.float32)
    blocks: Float32 = d[:, :, None] * spread - minimum[:, :, None]
    return blocks.reshape(-1, 256)


encode, decode = row_codec(_encode, _decode, _encode_weighted)
