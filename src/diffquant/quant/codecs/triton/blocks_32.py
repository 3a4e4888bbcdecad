"""Encoders of ggml's blocks of 32 weights; layouts as in codecs/q8_0.py and its siblings.

One lane is one block. With importance blocks are searched: weighted_32.py.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import (
    elements,
    fifth_bits,
    inverse,
    nibbles,
    round_half_away,
    store_bytes,
    store_half,
    truncate,
)
from diffquant.quant.codecs.triton.scales import floor_log2, magnitude_bits
from diffquant.quant.codecs.triton.weighted_32 import encode_weighted

__all__ = ["mxfp4", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


@triton.jit
def _peak(x):
    """First element of largest magnitude, sign kept; +0 for zeros."""
    peak = tl.zeros_like(x[0])
    for i in tl.static_range(len(x)):
        peak = tl.where(tl.abs(x[i]) > tl.abs(peak), x[i], peak)
    return peak


@triton.jit
def _spread(x):
    """Smallest and largest element; of equal zeros the first."""
    low, high = x[0], x[0]
    for i in tl.static_range(1, len(x)):
        low = tl.where(x[i] < low, x[i], low)
        high = tl.where(x[i] > high, x[i], high)
    return low, high


@triton.jit
def _quantized(x, factor, low, ROUND: tl.constexpr, TOP: tl.constexpr):
    """Levels of (x - low) * factor, rounded by adding ROUND; none above TOP."""
    found = ()
    for i in tl.static_range(len(x)):
        level = truncate((x[i] - low) * factor + ROUND)
        found = found + (tl.minimum(level, TOP),)
    return found


@triton.jit
def _q8_0(dst, at, x, mask):
    most = tl.abs(x[0])
    for i in tl.static_range(1, 32):
        most = tl.maximum(most, tl.abs(x[i]))
    scale = tl.div_rn(most, tl.full(most.shape, 127.0, tl.float32))
    store_half(dst, at, scale, mask)
    factor, found = inverse(scale), ()
    for i in tl.static_range(32):
        found = found + (round_half_away(x[i] * factor) & 255,)
    store_bytes(dst, at + 2, found, mask, tl.int16, 2)


@triton.jit
def _symmetric(dst, at, x, mask, HALF: tl.constexpr, FIVE: tl.constexpr):
    scale = _peak(x) * (-1.0 / HALF)  # a power of two: as exact as the division
    store_half(dst, at, scale, mask)
    levels = _quantized(x, inverse(scale), 0.0, HALF + 0.5, 2 * HALF - 1)
    if FIVE:
        store_bytes(dst, at + 2, fifth_bits(levels), mask, tl.int16, 2)
        at += 4
    store_bytes(dst, at + 2, nibbles(levels), mask, tl.int16, 2)


@triton.jit
def _affine(dst, at, x, mask, TOP: tl.constexpr, FIVE: tl.constexpr):
    low, high = _spread(x)
    scale = tl.div_rn(high - low, tl.full(low.shape, TOP, tl.float32))
    store_half(dst, at, scale, mask)
    store_half(dst, at + 2, low, mask)
    levels = _quantized(x, inverse(scale), low, 0.5, TOP)
    if FIVE:
        store_bytes(dst, at + 4, fifth_bits(levels), mask, tl.int16, 2)
        at += 4
    store_bytes(dst, at + 4, nibbles(levels), mask, tl.int16, 2)


@triton.jit
def _q4_0(dst, at, x, mask):
    _symmetric(dst, at, x, mask, 8, False)


@triton.jit
def _q5_0(dst, at, x, mask):
    _symmetric(dst, at, x, mask, 16, True)


@triton.jit
def _q4_1(dst, at, x, mask):
    _affine(dst, at, x, mask, 15, False)


@triton.jit
def _q5_1(dst, at, x, mask):
    _affine(dst, at, x, mask, 31, True)


@triton.jit
def _mxfp4(dst, at, x, mask):
    most = magnitude_bits(x[0])
    for i in tl.static_range(1, 32):
        most = tl.maximum(most, magnitude_bits(x[i]))
    whole = tl.where(most < 0x7F800000, floor_log2(most), 0)
    exponent = tl.where(most > 0, whole + 125 & 255, 0)
    # 2**(exponent - 128), the smallest two subnormal; products with it are exact.
    scale = tl.where(exponent < 2, exponent + 1 << 21, exponent - 1 << 23)
    scale = scale.to(tl.float32, bitcast=True)
    # Midpoints of 0, 1, 2, 3, 4, 6, 8, 12.
    low = (0.5 * scale, 1.5 * scale, 2.5 * scale, 3.5 * scale)
    bounds = low + (5.0 * scale, 7.0 * scale, 10.0 * scale)
    levels = ()
    for i in tl.static_range(32):
        size, level = tl.abs(x[i]), tl.zeros_like(exponent)
        for j in tl.static_range(7):
            level += (size > bounds[j]).to(tl.int32)
        levels = levels + (level | ((x[i] < 0.0) & (level > 0)).to(tl.int32) << 3,)
    store_bytes(dst, at, (exponent,), mask, tl.int8, 1)
    store_bytes(dst, at + 1, nibbles(levels), mask, tl.int8, 1)


@triton.jit(do_not_specialize=["blocks"])
def _blocks(src, dst, blocks, ENCODE: tl.constexpr, NBYTES: tl.constexpr, LANES: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * LANES  # 64 bits: weights beyond 2**31 bytes
    src += first * 32
    dst += first * NBYTES
    lane = tl.arange(0, LANES)
    mask = lane < blocks - first
    ENCODE(dst, lane * NBYTES, elements(src, lane, mask, 32), mask)


def _encode(
    kernel: object,
    nbytes: int,
    top: int,
    affine: bool,
    weight: Tensor,
    stats: None = None,
    *,
    fmt: str,
    importance: Tensor | None = None,
) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of 32; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    blocks, (number, warps) = weight.numel() // 32, lanes(fmt)
    packed = torch.empty((rows, width // 32 * nbytes), dtype=torch.uint8, device=weight.device)
    if importance is not None:
        encode_weighted(weight, importance, packed, fmt=fmt, top=top, affine=affine)
        return {"weight": packed}
    launch(
        _blocks,
        -(-blocks // number),
        warps,
        weight,
        packed,
        blocks,
        ENCODE=kernel,
        NBYTES=nbytes,
        LANES=number,
    )
    return {"weight": packed}


q8_0 = functools.partial(_encode, _q8_0, 34, 0, False)  # has no mode with importance, as mxfp4
q4_0 = functools.partial(_encode, _q4_0, 18, 15, False)
q4_1 = functools.partial(_encode, _q4_1, 20, 15, True)
q5_0 = functools.partial(_encode, _q5_0, 22, 31, False)
q5_1 = functools.partial(_encode, _q5_1, 24, 31, True)
mxfp4 = functools.partial(_encode, _mxfp4, 17, 0, False)
