"""Encoder of Q3_K; layout as in codecs/q3_k.py, search as in codecs/descent_search.py.

One lane is a sub-block of 16, sixteen neighbouring lanes are a super-block. With importance other
searches come first, weighted_q3_k.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.descent_search import ROUNDS
from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import elements, nearest_int, store_bytes, store_half
from diffquant.quant.codecs.triton.super_blocks import (
    halves_of,
    largest_of,
    part_places,
    per_lane,
    quarters,
)
from diffquant.quant.codecs.triton.symmetric_search import largest
from diffquant.quant.codecs.triton.weighted_q3_k import search, searched_levels

__all__ = ["q3_k"]


@triton.jit
def _level(value):
    """nearest_int cut to -4..3, as float32."""
    return tl.minimum(tl.maximum(nearest_int(value), -4), 3).to(tl.float32)


@triton.jit
def _descend(x, levels, sum_lx, sum_l2):
    """One round: each element in turn takes the level that the others' fit wants, if it helps."""
    found = ()
    for i in tl.static_range(len(x)):
        weight = x[i] * x[i]
        rest_lx = sum_lx - weight * x[i] * levels[i]
        rest_l2 = sum_l2 - weight * levels[i] * levels[i]
        possible = rest_lx > 0.0
        trial = _level(tl.div_rn(x[i] * rest_l2, tl.where(possible, rest_lx, 1.0)))
        trial_lx = rest_lx + weight * x[i] * trial
        trial_l2 = rest_l2 + weight * trial * trial
        gain = trial_lx * trial_lx * sum_l2 > sum_lx * sum_lx * trial_l2
        better = possible & (trial != levels[i]) & (trial_l2 > 0.0) & gain
        found = found + (tl.where(better, trial, levels[i]),)
        sum_lx = tl.where(better, trial_lx, sum_lx)
        sum_l2 = tl.where(better, trial_l2, sum_l2)
    return found, sum_lx, sum_l2


@triton.jit
def _search(x, ROUNDS: tl.constexpr):
    """Scale, of either sign; levels -4 to 3; and whether nothing reaches 1e-15 (GROUP_MAX_EPS)."""
    peak = largest(x)
    empty = tl.abs(peak) < 1e-15
    factor = tl.div_rn(tl.full(peak.shape, -4.0, tl.float32), tl.where(empty, 1.0, peak))
    levels, sum_lx, sum_l2 = (), tl.zeros_like(peak), tl.zeros_like(peak)
    for i in tl.static_range(len(x)):
        level = _level(factor * x[i])
        levels = levels + (level,)
        sum_lx = sum_lx + x[i] * x[i] * x[i] * level
        sum_l2 = sum_l2 + x[i] * x[i] * level * level
    for _ in range(ROUNDS):
        levels, sum_lx, sum_l2 = _descend(x, levels, sum_lx, sum_l2)
    fitted = (sum_l2 > 0.0) & (tl.abs(peak) >= 1e-15)
    return tl.where(fitted, tl.div_rn(sum_lx, sum_l2), 0.0), levels, empty


@triton.jit
def _store_scales(dst, block, scales, mask, BLOCKS: tl.constexpr):
    """(B, 16) of 0 to 63: low nibbles in 8 bytes, upper bits in 4."""
    first, last = halves_of(scales, BLOCKS, 16)
    place = dst + (block[:, None] * 110 + 96)
    nibbles = (first & 15 | (last & 15) << 4).to(tl.uint8)
    tl.store(place + tl.arange(0, 8)[None, :], nibbles, mask=mask[:, None])
    upper = tl.reshape(scales >> 4, (BLOCKS, 4, 4)) << (tl.arange(0, 4) * 2)[None, :, None]
    upper = tl.sum(upper, axis=1).to(tl.uint8)
    tl.store(place + (8 + tl.arange(0, 4)[None, :]), upper, mask=mask[:, None])


@triton.jit
def _store(dst, x, scales, size, searched, blocks, LANES: tl.constexpr):
    """Store super-blocks: scales (B, 16) of 0 to 63, the size of a step (B,), levels.

    These are rounded against what is stored; where a scale rounded to 0 they are those that the
    search found, a tuple of 0 to 7.
    """
    BLOCKS: tl.constexpr = LANES // 16
    block, lane = tl.arange(0, BLOCKS), tl.arange(0, LANES)
    mask = block < blocks
    size = store_half(dst, block * 110 + 108, size, mask)
    _store_scales(dst, block, scales, mask, BLOCKS)
    d = tl.reshape(size[:, None] * (scales - 32).to(tl.float32), (LANES,))
    divisor = tl.where(d != 0.0, d, 1.0)
    third, lower = (), ()
    for i in tl.static_range(16):
        level = tl.minimum(tl.maximum(nearest_int(tl.div_rn(x[i], divisor)), -4), 3) + 4
        level = tl.where(d != 0.0, level, searched[i])
        bits = tl.reshape(level >> 2 << (lane % 16 // 2), (BLOCKS, 8, 2))
        third = third + (tl.reshape(tl.sum(bits, axis=1), (BLOCKS * 2,)),)
        a, b, c, e = quarters(level & 3, BLOCKS)
        lower = lower + (a | b << 2 | c << 4 | e << 6,)
    part = tl.arange(0, BLOCKS * 2)
    place = part // 2 * 110 + part % 2 * 16
    store_bytes(dst, place, third, part // 2 < blocks, tl.int16, 2)
    place = part_places(BLOCKS, 110, 32, 32)
    store_bytes(dst, place, lower, per_lane(mask, BLOCKS, 4), tl.int16, 2)


@triton.jit(do_not_specialize=["blocks"])
def _super_blocks(src, dst, blocks, ROUNDS: tl.constexpr, LANES: tl.constexpr):
    BLOCKS: tl.constexpr = LANES // 16
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: weights beyond 2**31 bytes
    blocks -= first
    lane = tl.arange(0, LANES)
    x = elements(src + first * 256, lane, lane // 16 < blocks, 16)
    scale, searched, nothing = _search(x, ROUNDS)
    levels = ()
    for i in tl.static_range(16):
        levels = levels + (tl.where(nothing, 0, searched[i].to(tl.int32) + 4),)

    most = largest_of(scale, BLOCKS, 16)
    empty = most == 0.0
    inverse = tl.div_rn(tl.full(most.shape, -32.0, tl.float32), tl.where(empty, 1.0, most))
    scales = nearest_int(inverse[:, None] * tl.reshape(scale, (BLOCKS, 16)))
    scales = tl.minimum(tl.maximum(scales, -32), 31) + 32
    scales = tl.where(empty[:, None], 0, scales)
    size = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), inverse)
    size = tl.where(empty, 0.0, size)
    _store(dst + first * 110, x, scales, size, levels, blocks, LANES)


@triton.jit(do_not_specialize=["blocks"])
def _finish(src, dst, found, steps, sizes, blocks, LANES: tl.constexpr):
    """Store super-blocks whose sub-blocks and steps were searched: weighted_q3_k.py."""
    BLOCKS: tl.constexpr = LANES // 16
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    count = blocks * 16
    blocks -= first
    lane, block = tl.arange(0, LANES), tl.arange(0, BLOCKS)
    exists, mask = lane // 16 < blocks, block < blocks
    x = elements(src + first * 256, lane, exists, 16)
    levels = searched_levels(x, found, first * 16 + lane, count, exists)
    place = (first + block)[:, None] * 16 + tl.arange(0, 16)[None, :]
    scales = tl.load(steps + place, mask=mask[:, None], other=0).to(tl.int32)
    size = tl.load(sizes + first + block, mask=mask, other=0.0)
    _store(dst + first * 110, x, scales, size, levels, blocks, LANES)


def q3_k(
    weight: Tensor, stats: None = None, *, fmt: str, importance: Tensor | None = None
) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of 256; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    blocks, (number, warps) = weight.numel() // 256, lanes(fmt)
    packed = torch.empty((rows, width // 256 * 110), dtype=torch.uint8, device=weight.device)
    programs, options = -(-blocks * 16 // number), {"LANES": number}
    if importance is not None:
        found = search(weight, importance, lanes(fmt))
        launch(_finish, programs, warps, weight, packed, *found, blocks, **options)
    else:
        launch(_super_blocks, programs, warps, weight, packed, blocks, ROUNDS=ROUNDS, **options)
    return {"weight": packed}
