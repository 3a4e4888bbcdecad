"""Encoder of Q6_K; layout as in codecs/q6_k.py. Importance is the weight of an error.

One lane is a sub-block of 16, sixteen neighbouring lanes are a super-block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.triton.importance import column_weights
from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import elements, nearest_int, store_bytes, store_half
from diffquant.quant.codecs.triton.super_blocks import (
    largest_of,
    part_places,
    per_lane,
    quarters,
)
from diffquant.quant.codecs.triton.symmetric_search import symmetric_grids, symmetric_search

__all__ = ["q6_k"]


@triton.jit(do_not_specialize=["blocks", "columns"])
def _super_blocks(
    src,
    dst,
    grids,
    importance,
    blocks,
    columns,
    COUNT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
):
    BLOCKS: tl.constexpr = LANES // 16
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: weights beyond 2**31 bytes
    src += first * 256
    dst += first * 210
    lane = tl.arange(0, LANES)
    exists = lane // 16 < blocks - first
    x = elements(src, lane, exists, 16)
    weight = x
    if WEIGHTED:
        weight = column_weights(importance, first * 16 + lane, columns, exists, 16)
    scale, factor, nothing = symmetric_search(x, weight, grids, COUNT, 32, WEIGHTED)

    block = tl.arange(0, BLOCKS)
    mask = block < blocks - first
    most = largest_of(scale, BLOCKS, 16)
    empty = tl.abs(most) < 1e-15  # stored as zeros throughout
    inverse = tl.div_rn(tl.full(most.shape, -128.0, tl.float32), tl.where(empty, 1.0, most))
    size = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), inverse)
    size = store_half(dst, block * 210 + 208, tl.where(empty, 0.0, size), mask)
    scales = nearest_int(inverse[:, None] * tl.reshape(scale, (BLOCKS, 16)))
    # 127 at most, kept in a byte as in C; 0 where the super-block is empty
    scales = (tl.minimum(scales, 127) & 255 ^ 128) - 128
    scales = tl.where(empty[:, None], 0, scales)
    place = dst + (block[:, None] * 210 + 192 + tl.arange(0, 16)[None, :])
    tl.store(place, (scales & 255).to(tl.uint8), mask=mask[:, None])

    # Levels against what is stored; where the scale rounded to 0, those that the search found.
    d = tl.reshape(size[:, None] * scales.to(tl.float32), (LANES,))
    zero = per_lane(empty, BLOCKS, 16) | nothing & (d == 0.0)
    divisor = tl.where(d != 0.0, d, 1.0)
    low_a, low_b, upper = (), (), ()
    for i in tl.static_range(16):
        level = nearest_int(tl.div_rn(x[i], divisor))
        level = tl.where(d != 0.0, level, nearest_int(factor * x[i]))
        level = tl.minimum(tl.maximum(level, -32), 31) + 32
        a, b, c, e = quarters(tl.where(zero, 0, level), BLOCKS)
        low_a = low_a + (a & 15 | (c & 15) << 4,)
        low_b = low_b + (b & 15 | (e & 15) << 4,)
        upper = upper + (a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6,)
    mask = per_lane(mask, BLOCKS, 4)
    store_bytes(dst, part_places(BLOCKS, 210, 0, 64), low_a, mask, tl.int16, 2)
    store_bytes(dst, part_places(BLOCKS, 210, 32, 64), low_b, mask, tl.int16, 2)
    store_bytes(dst, part_places(BLOCKS, 210, 128, 32), upper, mask, tl.int16, 2)


def q6_k(
    weight: Tensor, stats: None = None, *, fmt: str, importance: Tensor | None = None
) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of 256; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    blocks, (count, warps) = weight.numel() // 256, lanes(fmt)
    packed = torch.empty((rows, width // 256 * 210), dtype=torch.uint8, device=weight.device)
    grids = symmetric_grids(32, weight.device)
    launch(
        _super_blocks,
        -(-blocks * 16 // count),
        warps,
        weight,
        packed,
        grids,
        importance if importance is not None else weight,
        blocks,
        width // 16,
        COUNT=grids.numel(),
        WEIGHTED=importance is not None,
        LANES=count,
    )
    return {"weight": packed}
