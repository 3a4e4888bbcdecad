"""Encoders of Q4_K and Q5_K; layout as in codecs/k_affine.py.

One lane is a sub-block of 32, eight neighbouring lanes are a super-block.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs import q4_k as q4
from diffquant.quant.codecs import q5_k as q5
from diffquant.quant.codecs.affine_search import WEIGHTED, Candidates
from diffquant.quant.codecs.triton.affine_search import (
    affine_levels,
    affine_search,
    spread_weights,
)
from diffquant.quant.codecs.triton.importance import mean_squares
from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import (
    elements,
    nearest_int,
    store_bytes,
    store_half,
)
from diffquant.quant.codecs.triton.super_blocks import halves_of, round_steps
from diffquant.quant.codecs.triton.weighted import (
    fit_steps,
    grids_of,
    load_levels,
    load_steps,
    search_sub_blocks,
)

__all__ = ["q4_k", "q5_k"]


@triton.jit
def _together(first, last, BLOCKS: tl.constexpr):
    """Those of sub-blocks 0 to 3 and of 4 to 7, (B, 4) each -> (B, 8)."""
    return tl.reshape(tl.permute(tl.join(first, last), (0, 2, 1)), (BLOCKS, 8))


@triton.jit
def _store_steps(dst, block, scale, low, mask, BLOCKS: tl.constexpr):
    """Store steps of a byte in 6 bits; returns what is read again: scales and minima (B, 8)."""
    scale_first, scale_last = halves_of(scale, BLOCKS, 8)
    low_first, low_last = halves_of(low, BLOCKS, 8)
    first = (scale_first | scale_last >> 4 << 6) & 255
    second = (low_first | low_last >> 4 << 6) & 255
    third = scale_last & 15 | low_last << 4 & 240
    place = dst + block[:, None] + tl.arange(0, 4)[None, :]
    mask = mask[:, None]
    tl.store(place + 4, first.to(tl.uint8), mask=mask)
    tl.store(place + 8, second.to(tl.uint8), mask=mask)
    tl.store(place + 12, third.to(tl.uint8), mask=mask)
    scales = _together(first & 63, third & 15 | first >> 6 << 4, BLOCKS)
    lows = _together(second & 63, third >> 4 | second >> 6 << 4, BLOCKS)
    return scales, lows


@triton.jit
def _store(
    dst,
    x,
    scales,
    lows,
    size,
    low_size,
    factor,
    start,
    blocks,
    TOP: tl.constexpr,
    NBYTES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Store super-blocks: steps (B, 8), their sizes (B,), and levels against what is stored.

    Where a scale rounded to 0 the levels are those that the search found: of `factor` and `start`.
    """
    BLOCKS: tl.constexpr = LANES // 8
    block = tl.arange(0, BLOCKS)
    mask = block < blocks
    size = store_half(dst, block * NBYTES, size, mask)
    low_size = store_half(dst, block * NBYTES + 2, low_size, mask)
    scales, lows = _store_steps(dst, block * NBYTES, scales, lows, mask, BLOCKS)
    d = tl.reshape(size[:, None] * scales.to(tl.float32), (LANES,))
    minimum = tl.reshape(low_size[:, None] * lows.to(tl.float32), (LANES,))
    searched = affine_levels(x, factor, start, TOP)
    divisor = tl.where(d != 0.0, d, 1.0)
    low_nibbles, fifth = (), ()
    pair, lane = tl.arange(0, LANES // 2), tl.arange(0, LANES)
    for i in tl.static_range(32):
        level = nearest_int(tl.div_rn(x[i] + minimum, divisor))
        level = tl.minimum(tl.maximum(level, 0), TOP)
        level = tl.where(d != 0.0, level, searched[i].to(tl.int32))
        even, odd = tl.split(tl.reshape(level & 15, (LANES // 2, 2)))
        low_nibbles = low_nibbles + (even | odd << 4,)
        if TOP > 15:
            bits = tl.reshape((level >> 4) << (lane % 8), (BLOCKS, 8))
            fifth = fifth + (tl.sum(bits, axis=1),)
    at = 16
    if TOP > 15:
        store_bytes(dst, block * NBYTES + 16, fifth, mask, tl.int32, 4)
        at = 48
    place = pair // 4 * NBYTES + pair % 4 * 32 + at
    store_bytes(dst, place, low_nibbles, pair // 4 < blocks, tl.int32, 4)
    return at


@triton.jit(do_not_specialize=["blocks"])
def _super_blocks(
    src,
    dst,
    grids,
    blocks,
    COUNT: tl.constexpr,
    TOP: tl.constexpr,
    NBYTES: tl.constexpr,
    LANES: tl.constexpr,
):
    BLOCKS: tl.constexpr = LANES // 8
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: weights beyond 2**31 bytes
    dst += first * NBYTES
    blocks -= first
    lane = tl.arange(0, LANES)
    x = elements(src + first * 256, lane, lane // 8 < blocks, 32)
    base = spread_weights(x)
    scale, low, factor, start, _ = affine_search(x, base, grids, COUNT, TOP, False, False)
    scales, size = round_steps(scale, BLOCKS, 8, 63)
    lows, low_size = round_steps(-low, BLOCKS, 8, 63)
    scales, lows = tl.minimum(scales, 63), tl.minimum(lows, 63)
    _store(dst, x, scales, lows, size, low_size, factor, start, blocks, TOP, NBYTES, LANES)


@triton.jit(do_not_specialize=["blocks"])
def _finish(
    src,
    dst,
    found,
    steps,
    sizes,
    blocks,
    TOP: tl.constexpr,
    NBYTES: tl.constexpr,
    LANES: tl.constexpr,
):
    """Store super-blocks whose sub-blocks and steps were searched: weighted.py."""
    BLOCKS: tl.constexpr = LANES // 8
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    dst += first * NBYTES
    count = blocks * 8
    blocks -= first
    lane = tl.arange(0, LANES)
    exists = lane // 8 < blocks
    x = elements(src + first * 256, lane, exists, 32)
    factor, start = load_levels(found, first * 8 + lane, count, exists)
    scales, lows, size, low_size = load_steps(steps, sizes, first, count, blocks, BLOCKS, 8)
    _store(dst, x, scales, lows, size, low_size, factor, start, blocks, TOP, NBYTES, LANES)


def _encode(
    top: int,
    clamp: int,
    candidates: Candidates,
    nbytes: int,
    weight: Tensor,
    stats: None = None,
    *,
    fmt: str,
    importance: Tensor | None = None,
) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of 256; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    blocks, (number, warps) = weight.numel() // 256, lanes(fmt)
    packed = torch.empty((rows, width // 256 * nbytes), dtype=torch.uint8, device=weight.device)
    programs = -(-blocks * 8 // number)
    layout = {"TOP": top, "NBYTES": nbytes, "LANES": number}
    if importance is not None:
        grids = grids_of(WEIGHTED, top, weight.device)
        sigma2 = mean_squares(weight, 256, 2.0)
        found = search_sub_blocks(weight, importance, sigma2, grids, lanes(fmt), size=32, top=top)
        steps, sizes = fit_steps(found, sub=8, top=63, clamp=clamp)
        launch(_finish, programs, warps, weight, packed, found, steps, sizes, blocks, **layout)
    else:
        grids = grids_of(candidates, top, weight.device)
        count = candidates.steps + 1
        launch(_super_blocks, programs, warps, weight, packed, grids, blocks, COUNT=count, **layout)
    return {"weight": packed}


q4_k = functools.partial(_encode, q4.TOP, q4.CLAMP, q4.CANDIDATES, 144)
q5_k = functools.partial(_encode, q5.TOP, q5.CLAMP, q5.CANDIDATES, 176)
