"""Encoders with importance of Q4_0, Q4_1, Q5_0 and Q5_1: searches, where blocks_32.py has formulas.

One lane is one block of 32; a row of the weight shares a mean square.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.affine_search import WEIGHTED
from diffquant.quant.codecs.triton.affine_search import affine_levels, affine_search
from diffquant.quant.codecs.triton.importance import mean_squares, spread_columns
from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import (
    elements,
    fifth_bits,
    nearest_int,
    nibbles,
    store_bytes,
    store_half,
)
from diffquant.quant.codecs.triton.symmetric_search import symmetric_grids, symmetric_search
from diffquant.quant.codecs.triton.weighted import grids_of

__all__ = ["encode_weighted"]


@triton.jit
def _symmetric(dst, at, x, weight, grids, mask, COUNT: tl.constexpr, TOP: tl.constexpr):
    HALF: tl.constexpr = TOP // 2 + 1
    scale, factor, empty = symmetric_search(x, weight, grids, COUNT, HALF, True)
    store_half(dst, at, scale, mask)
    levels = ()
    for i in tl.static_range(32):
        level = tl.minimum(tl.maximum(nearest_int(factor * x[i]), -HALF), HALF - 1) + HALF
        levels = levels + (tl.where(empty, 0, level),)
    return levels


@triton.jit
def _affine(dst, at, x, weight, grids, mask, COUNT: tl.constexpr, TOP: tl.constexpr):
    scale, low, factor, start, _ = affine_search(x, weight, grids, COUNT, TOP, False, True)
    store_half(dst, at, scale, mask)
    store_half(dst, at + 2, low, mask)
    levels, found = affine_levels(x, factor, start, TOP), ()
    for i in tl.static_range(32):
        found = found + (levels[i].to(tl.int32),)
    return found


@triton.jit(do_not_specialize=["blocks", "columns"])
def _blocks(
    src,
    dst,
    grids,
    importance,
    sigma2,
    blocks,
    columns,
    COUNT: tl.constexpr,
    TOP: tl.constexpr,
    AFFINE: tl.constexpr,
    NBYTES: tl.constexpr,
    LANES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * LANES  # 64 bits: weights beyond 2**31 bytes
    lane = tl.arange(0, LANES)
    mask = lane < blocks - first
    x = elements(src + first * 32, lane, mask, 32)
    weight = spread_columns(x, importance, first + lane, columns, sigma2, columns, mask)
    dst += first * NBYTES
    if AFFINE:
        levels = _affine(dst, lane * NBYTES, x, weight, grids, mask, COUNT, TOP)
    else:
        levels = _symmetric(dst, lane * NBYTES, x, weight, grids, mask, COUNT, TOP)
    AT: tl.constexpr = 2 + 2 * AFFINE
    FIFTH: tl.constexpr = 4 * (TOP > 15)
    if TOP > 15:
        store_bytes(dst, lane * NBYTES + AT, fifth_bits(levels), mask, tl.int16, 2)
    store_bytes(dst, lane * NBYTES + AT + FIFTH, nibbles(levels), mask, tl.int16, 2)


def encode_weighted(
    weight: Tensor, importance: Tensor, packed: Tensor, *, fmt: str, top: int, affine: bool
) -> None:
    """Fill `packed` (R, K / 32 * block) with the blocks of (R, K) rows, by (K,) importance.

    `top` is the largest level; `affine` says whether blocks store a minimum.
    """
    number, warps = lanes(fmt)
    blocks, columns = weight.numel() // 32, weight.shape[1] // 32
    device = weight.device
    grids = grids_of(WEIGHTED, top, device) if affine else symmetric_grids(top // 2 + 1, device)
    launch(
        _blocks,
        -(-blocks // number),
        warps,
        weight,
        packed,
        grids,
        importance,
        mean_squares(weight, weight.shape[1]),
        blocks,
        columns,
        COUNT=grids.numel(),
        TOP=top,
        AFFINE=affine,
        NBYTES=packed.shape[1] // max(columns, 1),
        LANES=number,
    )
