"""Super-blocks of Q4_K and Q5_K: 8 sub-blocks of 32 weights with 6-bit scale and minimum each.

    offset  0        2           4                  16
            d (f16)  dmin (f16)  12 bytes of 6 bits  levels     decoded = d * sc * level - dmin * m

The 12 bytes, for sub-blocks j = 0..3 and k = j + 4:

    byte j       bits 0-5 sc[j]   bits 6-7 upper two bits of sc[k]
    byte j + 4   bits 0-5 m[j]    bits 6-7 upper two bits of m[k]
    byte j + 8   bits 0-3 lower four of sc[k]   bits 4-7 lower four of m[k]

Source: ggml-quants.c quantize_row_q4_K_ref, quantize_row_q5_K_ref, with importance
quantize_row_q4_K_impl, quantize_row_q5_K_impl; get_scale_min_k4; ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs import affine_search, fields
from diffquant.quant.codecs.affine_search import WEIGHTED, Candidates, columns_of
from diffquant.quant.codecs.arrays import Bytes, Float32, Int32
from diffquant.quant.codecs.scale_search import sum_rows

__all__ = ["decode_super_blocks", "encode_super_blocks", "encode_weighted"]

_F = np.float32


def _pack_scales(scale: Bytes, low: Bytes) -> Bytes:
    """(B, 8) and (B, 8) of 6 bits -> (B, 12)."""
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = low[:, :4] | low[:, 4:] >> 4 << 6
    third = scale[:, 4:] & 15 | low[:, 4:] << 4
    return np.concatenate([first, second, third], axis=1)


def _unpack_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """(B, 12) -> (B, 8) and (B, 8), the inverse of `_pack_scales`."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scale = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    low = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scale, low


def _six_bits(values: Float32) -> tuple[Bytes, Float32]:
    """(B, 8) -> 6-bit steps (B, 8) and the size of a step (B, 1): the largest is 63 steps."""
    most = np.maximum(values.max(axis=1, keepdims=True), _F(0))
    inverse = np.where(most > 0, _F(63) / most, _F(0))
    steps = fields.nearest_int(inverse * values).astype(np.uint8)
    return np.minimum(steps, 63), most / _F(63)


def encode_super_blocks(blocks: Float32, top: int, candidates: Candidates) -> tuple[Bytes, Bytes]:
    """Search scales, round them to 6 bits, and quantize against what was stored.

    Args:
        blocks: (B, 256) float32.
        top: largest level, 15 or 31.
        candidates: see `affine_search.affine_search`.

    Returns:
        header (B, 16), levels (B, 8, 32).
    """
    x = columns_of(blocks, 32)  # (32, 8 B)
    spread = np.sqrt(sum_rows(x * x) / _F(32))
    found = affine_search.affine_search(x, spread + np.abs(x), top, candidates)
    scale, scale_step = _six_bits(found[0].reshape(-1, 8))
    low, low_step = _six_bits(found[1].reshape(-1, 8))
    return _quantize(x, top, found[2], (scale, scale_step[:, 0]), (low, low_step[:, 0]))


def encode_weighted(
    weight: Float32, importance: Float32, top: int, clamp: int
) -> tuple[Bytes, Bytes]:
    """`encode_super_blocks` with importance: another grid, and steps fitted, not just rounded.

    Args:
        weight: (R, K) float32.
        importance: (K,) float32.
        top: largest level, 15 or 31.
        clamp: largest stored scale; ggml bounds Q5_K's to 63 and leaves a byte to Q4_K's, which
            matters for scales that came out negative.
    """
    x = columns_of(weight, 32)  # (32, 8 B)
    sigma2 = affine_search.mean_squares(weight.reshape(-1, 256), 2.0)
    weights = affine_search.weigh(x, importance, sigma2)
    found = affine_search.affine_search(x, weights, top, WEIGHTED)
    sums = sum_rows(weights).reshape(-1, 8).T
    fits = []
    for values in found[:2]:
        step, steps = affine_search.positive_search(values.reshape(-1, 8).T, sums, 63)
        fits.append((np.minimum(steps.T, np.uint8(clamp)), step))
    return _quantize(x, top, found[2], *fits)


def _quantize(
    x: Float32,
    top: int,
    searched: Int32,
    scales: tuple[Bytes, Float32],
    lows: tuple[Bytes, Float32],
) -> tuple[Bytes, Bytes]:
    """Store (B, 8) scales and minima beside the size of their steps (B,), and take levels anew."""
    header = (
        fields.half_bytes(scales[1]),
        fields.half_bytes(lows[1]),
        _pack_scales(scales[0], lows[0]),
    )
    scale, low = _unpack_scales(header[2])
    d = (fields.halves(header[0]) * scale).reshape(-1)  # (8 B,)
    minimum = (fields.halves(header[1]) * low).reshape(-1)
    against = np.clip(fields.nearest_int((x + minimum) / d), 0, top)
    levels = np.where(d != 0, against, searched)  # a scale that rounds to 0 keeps the search's
    return np.concatenate(header, axis=1), levels.T.reshape(-1, 8, 32).astype(np.uint8)


def decode_super_blocks(header: Bytes, levels: Bytes) -> Float32:
    """Multiply levels (B, 8, 32) by their scales and subtract their minima: (B, 256)."""
    scale, low = _unpack_scales(header[:, 4:])
    d = fields.halves(header[:, :2]) * scale
    minimum = fields.halves(header[:, 2:4]) * low
    return (d[:, :, None] * levels.astype(np.float32) - minimum[:, :, None]).reshape(-1, 256)
