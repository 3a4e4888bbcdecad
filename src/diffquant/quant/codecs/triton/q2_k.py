"""Encoder of Q2_K; layout as in codecs/q2_k.py.

One lane is a sub-block of 16, sixteen neighbouring lanes are a super-block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.affine_search import WEIGHTED
from diffquant.quant.codecs.q2_k import CANDIDATES
from diffquant.quant.codecs.triton.affine_search import affine_levels, affine_search
from diffquant.quant.codecs.triton.importance import mean_squares
from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import elements, nearest_int, store_bytes, store_half
from diffquant.quant.codecs.triton.super_blocks import (
    part_places,
    per_lane,
    quarters,
    round_steps,
)
from diffquant.quant.codecs.triton.weighted import (
    fit_steps,
    grids_of,
    load_levels,
    load_steps,
    search_sub_blocks,
)

__all__ = ["q2_k"]

_TOP = 3


@triton.jit
def _store(dst, x, scales, lows, size, low_size, factor, start, blocks, LANES: tl.constexpr):
    """Store super-blocks: steps (B, 16), their sizes (B,), and levels against what is stored.

    Where a scale rounded to 0 the levels are those that the search found: of `factor` and `start`.
    """
    BLOCKS: tl.constexpr = LANES // 16
    block = tl.arange(0, BLOCKS)
    mask = block < blocks
    fours = (scales | lows << 4) & 255  # steps in bytes, as in C
    place = dst + (block[:, None] * 84 + tl.arange(0, 16)[None, :])
    tl.store(place, fours.to(tl.uint8), mask=mask[:, None])
    size = store_half(dst, block * 84 + 80, size, mask)
    low_size = store_half(dst, block * 84 + 82, low_size, mask)
    d = tl.reshape(size[:, None] * (fours & 15).to(tl.float32), (LANES,))
    minimum = tl.reshape(low_size[:, None] * (fours >> 4).to(tl.float32), (LANES,))
    searched = affine_levels(x, factor, start, 3)
    divisor = tl.where(d != 0.0, d, 1.0)
    packed = ()
    for i in tl.static_range(16):
        level = nearest_int(tl.div_rn(x[i] + minimum, divisor))
        level = tl.minimum(tl.maximum(level, 0), 3)
        level = tl.where(d != 0.0, level, searched[i].to(tl.int32))
        a, b, c, e = quarters(level, BLOCKS)
        packed = packed + (a | b << 2 | c << 4 | e << 6,)
    place = part_places(BLOCKS, 84, 16, 32)
    store_bytes(dst, place, packed, per_lane(mask, BLOCKS, 4), tl.int32, 4)
    return place


@triton.jit(do_not_specialize=["blocks"])
def _super_blocks(src, dst, grids, blocks, COUNT: tl.constexpr, LANES: tl.constexpr):
    BLOCKS: tl.constexpr = LANES // 16
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: weights beyond 2**31 bytes
    blocks -= first
    lane = tl.arange(0, LANES)
    x = elements(src + first * 256, lane, lane // 16 < blocks, 16)
    # An element weighs its magnitude; fits are compared by absolute errors.
    base = tl.zeros_like(x[0])
    scale, low, factor, start, _ = affine_search(x, base, grids, COUNT, 3, True, False)
    scales, size = round_steps(scale, BLOCKS, 16, 15)
    lows, low_size = round_steps(-low, BLOCKS, 16, 15)
    _store(dst + first * 84, x, scales, lows, size, low_size, factor, start, blocks, LANES)


@triton.jit(do_not_specialize=["blocks"])
def _finish(src, dst, found, steps, sizes, blocks, LANES: tl.constexpr):
    """Store super-blocks whose sub-blocks and steps were searched: weighted.py."""
    BLOCKS: tl.constexpr = LANES // 16
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    count = blocks * 16
    blocks -= first
    lane = tl.arange(0, LANES)
    exists = lane // 16 < blocks
    x = elements(src + first * 256, lane, exists, 16)
    factor, start = load_levels(found, first * 16 + lane, count, exists)
    scales, lows, size, low_size = load_steps(steps, sizes, first, count, blocks, BLOCKS, 16)
    _store(dst + first * 84, x, scales, lows, size, low_size, factor, start, blocks, LANES)


def q2_k(
    weight: Tensor, stats: None = None, *, fmt: str, importance: Tensor | None = None
) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of 256; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    blocks, (number, warps) = weight.numel() // 256, lanes(fmt)
    packed = torch.empty((rows, width // 256 * 84), dtype=torch.uint8, device=weight.device)
    programs = -(-blocks * 16 // number)
    if importance is not None:
        grids = grids_of(WEIGHTED, _TOP, weight.device)
        sigma2 = mean_squares(weight, 256)
        found = search_sub_blocks(weight, importance, sigma2, grids, lanes(fmt), size=16, top=_TOP)
        steps, sizes = fit_steps(found, sub=16, top=15, clamp=255)
        launch(_finish, programs, warps, weight, packed, found, steps, sizes, blocks, LANES=number)
    else:
        grids = grids_of(CANDIDATES, _TOP, weight.device)
        count = CANDIDATES.steps + 1
        launch(
            _super_blocks,
            programs,
            warps,
            weight,
            packed,
            grids,
            blocks,
            COUNT=count,
            LANES=number,
        )
    return {"weight": packed}
