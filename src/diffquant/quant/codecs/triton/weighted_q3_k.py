"""Searches with importance of Q3_K, as kernels of their own: weighted.py says why.

found  (3, S) float32 of S sub-blocks: scale, sum of weights, factor that levels follow from
steps  (S,) uint8 of scales, 0 to 63       sizes  (S / 16,) float32 of a step
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.triton.importance import mean_squares, spread_columns
from diffquant.quant.codecs.triton.launch import Lanes, launch
from diffquant.quant.codecs.triton.numbers import elements, nearest_int
from diffquant.quant.codecs.triton.symmetric_search import (
    largest,
    symmetric_grids,
    symmetric_search,
)

__all__ = ["search", "searched_levels"]


@triton.jit(do_not_specialize=["count", "columns"])
def _search(
    src,
    importance,
    sigma2,
    grids,
    found,
    count,
    columns,
    COUNT: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < count
    x = elements(src, lane, mask, 16)
    weight = spread_columns(x, importance, lane, columns, sigma2, 16, mask)
    scale, factor, _ = symmetric_search(x, weight, grids, COUNT, 4, True)
    total = tl.zeros_like(scale)
    for i in tl.static_range(16):
        total = total + weight[i]
    tl.store(found + lane, scale, mask=mask)
    tl.store(found + count + lane, total, mask=mask)
    tl.store(found + 2 * count + lane, factor, mask=mask)


@triton.jit(do_not_specialize=["blocks"])
def _fit(found, grids, steps, sizes, blocks, COUNT: tl.constexpr, LANES: tl.constexpr):
    # A super-block's scales are fitted as elements are.
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < blocks
    x = elements(found, lane, mask, 16)
    weight = elements(found + blocks * 16, lane, mask, 16)
    size, factor, empty = symmetric_search(x, weight, grids, COUNT, 32, True)
    tl.store(sizes + lane, size, mask=mask)
    for j in tl.static_range(16):
        step = tl.minimum(tl.maximum(nearest_int(factor * x[j]), -32), 31) + 32
        tl.store(steps + lane * 16 + j, tl.where(empty, 0, step).to(tl.uint8), mask=mask)


@triton.jit
def searched_levels(x, found, lane, count, mask):
    """The levels 0 to 7 that `_search` found, of every lane's elements: a tuple of int32."""
    factor = tl.load(found + 2 * count + lane, mask=mask, other=0.0)
    empty, levels = tl.abs(largest(x)) < 1e-15, ()
    for i in tl.static_range(16):
        level = tl.minimum(tl.maximum(nearest_int(factor * x[i]), -4), 3) + 4
        levels = levels + (tl.where(empty, 0, level),)
    return levels


def search(weight: Tensor, importance: Tensor, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor]:
    """Search (R, K) rows by (K,) importance: found, steps and sizes, see above."""
    count, device = weight.numel() // 16, weight.device
    found = torch.empty((3, count), dtype=torch.float32, device=device)
    steps = torch.empty(count, dtype=torch.uint8, device=device)
    sizes = torch.empty(count // 16, dtype=torch.float32, device=device)
    number, warps = lanes
    grids = symmetric_grids(4, device)
    launch(
        _search,
        -(-count // number),
        warps,
        weight,
        importance,
        mean_squares(weight, 256, 2.0),
        grids,
        found,
        count,
        weight.shape[1] // 16,
        COUNT=grids.numel(),
        LANES=number,
    )
    launch(
        _fit,
        -(-sizes.numel() // number),
        warps,
        found,
        symmetric_grids(32, device),
        steps,
        sizes,
        sizes.numel(),
        COUNT=grids.numel(),
        LANES=number,
    )
    return found, steps, sizes
