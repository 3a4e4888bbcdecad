"""Encoder of Q2_K; layout as in codecs/q2_k.py. Without importance.

One lane is a sub-block of 16, sixteen neighbouring lanes are a super-block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.q2_k import CANDIDATES
from diffquant.quant.codecs.triton.affine_search import affine_levels, affine_search
from diffquant.quant.codecs.triton.k_affine import grids_of
from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import elements, nearest_int, store_bytes, store_half
from diffquant.quant.codecs.triton.super_blocks import (
    part_places,
    per_lane,
    quarters,
    round_steps,
)

__all__ = ["q2_k"]

_TOP = 3


@triton.jit
def _super_blocks(src, dst, grids, blocks, COUNT: tl.constexpr, LANES: tl.constexpr):
    BLOCKS: tl.constexpr = LANES // 16
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: weights beyond 2**31 bytes
    src += first * 256
    dst += first * 84
    lane = tl.arange(0, LANES)
    x = elements(src, lane, lane // 16 < blocks - first, 16)
    # An element weighs its magnitude; fits are compared by absolute errors.
    base = tl.zeros_like(x[0])
    scale, low, factor, start, _ = affine_search(x, base, grids, COUNT, 3, True, False)

    block = tl.arange(0, BLOCKS)
    mask = block < blocks - first
    scales, size = round_steps(scale, BLOCKS, 16, 15)
    lows, low_size = round_steps(-low, BLOCKS, 16, 15)
    fours = (scales | lows << 4) & 255  # steps in bytes, as in C
    place = dst + (block[:, None] * 84 + tl.arange(0, 16)[None, :])
    tl.store(place, fours.to(tl.uint8), mask=mask[:, None])
    size = store_half(dst, block * 84 + 80, size, mask)
    low_size = store_half(dst, block * 84 + 82, low_size, mask)

    # Levels against what is stored; where the scale rounded to 0, those that the search found.
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


def q2_k(weight: Tensor, stats: None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of 256; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    blocks, (number, warps) = weight.numel() // 256, lanes(fmt)
    packed = torch.empty((rows, width // 256 * 84), dtype=torch.uint8, device=weight.device)
    launch(
        _super_blocks,
        -(-blocks * 16 // number),
        warps,
        weight,
        packed,
        grids_of(CANDIDATES, _TOP, weight.device),
        blocks,
        COUNT=CANDIDATES.steps + 1,
        LANES=number,
    )
    return {"weight": packed}
