"""Searches with importance of Q2_K, Q4_K and Q5_K, as kernels of their own.

First the sub-blocks, one in each lane; then the steps of their scales and minima, one super-block
in each lane; the codec stores what was found. In one kernel, numbers would change lanes in between,
and compiling takes minutes.

    found  (5, S) float32 of S sub-blocks: scale, minimum, sum of weights, and what levels follow
           from, factor and start
    steps  (2, S) uint8 of scales and of minima        sizes  (2, S / sub) float32 of a step
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.affine_search import Candidates
from diffquant.quant.codecs.triton.affine_search import affine_search
from diffquant.quant.codecs.triton.importance import spread_columns
from diffquant.quant.codecs.triton.launch import Lanes, launch
from diffquant.quant.codecs.triton.numbers import elements
from diffquant.quant.codecs.triton.positive_search import positive_search

__all__ = [
    "fit_steps",
    "grids_of",
    "load_levels",
    "load_steps",
    "positive_grids",
    "search_sub_blocks",
]

_FITS = Lanes(32, 1)


@triton.jit(do_not_specialize=["count", "columns", "run"])
def _search(
    src,
    importance,
    sigma2,
    grids,
    found,
    count,
    columns,
    run,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    TOP: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < count
    x = elements(src, lane, mask, SIZE)
    weight = spread_columns(x, importance, lane, columns, sigma2, run, mask)
    scale, low, factor, start, sums = affine_search(x, weight, grids, COUNT, TOP, False, True)
    tl.store(found + lane, scale, mask=mask)
    tl.store(found + count + lane, 0.0 - low, mask=mask)
    tl.store(found + 2 * count + lane, sums, mask=mask)
    tl.store(found + 3 * count + lane, factor, mask=mask)
    tl.store(found + 4 * count + lane, start, mask=mask)


@triton.jit
def load_levels(found, lane, count, mask):
    """What `affine_levels` makes the levels from that the search found: factor and start."""
    factor = tl.load(found + 3 * count + lane, mask=mask, other=0.0)
    return factor, tl.load(found + 4 * count + lane, mask=mask, other=0.0)


@triton.jit
def load_steps(steps, sizes, first, count, blocks, BLOCKS: tl.constexpr, SUB: tl.constexpr):
    """Steps of scales and of minima (B, SUB), and their sizes (B,) each, of a program's blocks.

    `first` is its first super-block, `count` that of all sub-blocks, `blocks` what is left.
    """
    block = tl.arange(0, BLOCKS)
    mask = block < blocks
    place = (first + block)[:, None] * SUB + tl.arange(0, SUB)[None, :]
    scales = tl.load(steps + place, mask=mask[:, None], other=0).to(tl.int32)
    lows = tl.load(steps + count + place, mask=mask[:, None], other=0).to(tl.int32)
    size = tl.load(sizes + first + block, mask=mask, other=0.0)
    low_size = tl.load(sizes + count // SUB + first + block, mask=mask, other=0.0)
    return scales, lows, size, low_size


@triton.jit(do_not_specialize=["blocks"])
def _fit(
    found,
    grids,
    steps,
    sizes,
    blocks,
    SUB: tl.constexpr,
    TOP: tl.constexpr,
    CLAMP: tl.constexpr,
    LANES: tl.constexpr,
):
    # First the scales of all super-blocks, then the minima: so lie `found`, `steps` and `sizes`.
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < 2 * blocks
    x = elements(found, lane, mask, SUB)
    weight = elements(found + 2 * blocks * SUB, lane % blocks, mask, SUB)
    size, level = positive_search(x, weight, grids, TOP)
    tl.store(sizes + lane, size, mask=mask)
    for j in tl.static_range(SUB):
        step = tl.minimum(level[j], CLAMP)
        tl.store(steps + lane * SUB + j, step.to(tl.uint8), mask=mask)


@functools.cache
def grids_of(candidates: Candidates, top: int, device: torch.device) -> Tensor:
    """Intervals of every candidate, rounded as the CPU's search rounds them: (n,) float32."""
    first, step = np.float32(candidates.first), np.float32(candidates.step)
    offsets = [first + step * np.float32(i) for i in range(candidates.steps + 1)]
    found = np.array([offset + np.float32(top) for offset in offsets], np.float32)
    return torch.from_numpy(found).to(device)


@functools.cache
def positive_grids(top: int, device: torch.device) -> Tensor:
    """Intervals of the positive search's candidates, the plain one first: (9,) float32."""
    step = np.float32(0.1)
    offsets = [step * np.float32(i) for i in (0, -4, -3, -2, -1, 1, 2, 3, 4)]
    found = np.array([offset + np.float32(top) for offset in offsets], np.float32)
    return torch.from_numpy(found).to(device)


def search_sub_blocks(
    weight: Tensor,
    importance: Tensor,
    sigma2: Tensor,
    grids: Tensor,
    lanes: Lanes,
    *,
    size: int,
    top: int,
) -> Tensor:
    """Search the sub-blocks of (R, K) rows.

    Args:
        weight: the rows.
        importance: (K,) float32.
        sigma2: mean squares of equal runs of sub-blocks.
        grids: intervals of the candidates.
        lanes: of a program.
        size: elements of a sub-block.
        top: largest level.

    Returns:
        found: see above.
    """
    count = weight.numel() // size
    found = torch.empty((5, count), dtype=torch.float32, device=weight.device)
    launch(
        _search,
        -(-count // lanes.number),
        lanes.warps,
        weight,
        importance,
        sigma2,
        grids,
        found,
        count,
        weight.shape[1] // size,
        max(count // max(sigma2.numel(), 1), 1),
        SIZE=size,
        COUNT=grids.numel(),
        TOP=top,
        LANES=lanes.number,
    )
    return found


def fit_steps(found: Tensor, *, sub: int, top: int, clamp: int) -> tuple[Tensor, Tensor]:
    """Search the steps of super-blocks of `sub` sub-blocks: steps and sizes, see above."""
    count = found.shape[1]
    steps = torch.empty((2, count), dtype=torch.uint8, device=found.device)
    sizes = torch.empty((2, count // sub), dtype=torch.float32, device=found.device)
    grids = positive_grids(top, found.device)
    launch(
        _fit,
        -(-sizes.numel() // _FITS.number),
        _FITS.warps,
        found,
        grids,
        steps,
        sizes,
        count // sub,
        SUB=sub,
        TOP=top,
        CLAMP=clamp,
        LANES=_FITS.number,
    )
    return steps, sizes
