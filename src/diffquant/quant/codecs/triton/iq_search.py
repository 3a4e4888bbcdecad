"""codecs/iq_search.py's search of the IQ2 and IQ3 formats, as kernels.

First the weights, signs and magnitudes of sub-blocks, one in each lane; then every candidate scale,
one of one sub-block in each lane: neighbours try neighbouring scales, most on the same grid points,
so they read the same candidates and as many of them. Lanes walk through a sub-block's groups in the
CPU's order. What comes of it is chosen in iq_choice.py.

    magnitude, weight  (S, size) float32 of S sub-blocks
    start              (2, S) float32: the first scale, and the magnitude that candidates put on the
                       highest level, 0 where the sub-block is not searched
    sums               (2, S, candidates) float32 of weight * x * q and weight * q * q
    moved              (S, candidates) whether levels of a group were off the grid
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.iq_candidates import grid_named
from diffquant.quant.codecs.iq_search import RULES, SUPER_BLOCK
from diffquant.quant.codecs.triton.importance import mean_squares, spread_columns
from diffquant.quant.codecs.triton.iq_choice import Tried, choose
from diffquant.quant.codecs.triton.iq_fit import fit_start
from diffquant.quant.codecs.triton.iq_nearest import (
    add_errors,
    candidate,
    grids_of,
    group_of,
    place,
    tables_of,
)
from diffquant.quant.codecs.triton.launch import Lanes, lanes, launch
from diffquant.quant.codecs.triton.numbers import elements

__all__ = ["Found", "search"]

_TRIALS = Lanes(32, 1)  # a warp: its lanes wait for the one with most candidates


class Found(NamedTuple):
    """Sub-blocks as they will be stored, see codecs/iq_search.py's Found.

    Attributes:
        scale: (B, sub-blocks) float32, not negative.
        point: (B, sub-blocks, groups) int16.
        signs: (B, sub-blocks, size / 8) uint8.
        empty: (B, sub-blocks) bool.
    """

    scale: Tensor
    point: Tensor
    signs: Tensor
    empty: Tensor


@triton.jit
def _even_signs(x, weight, minus, FIRST: tl.constexpr):
    """Of eight elements that whose sign is changed, 8 for none: the count of minus signs is even.

    It is the one that matters least; of equals the first.
    """
    least = tl.full(x[0].shape, float("inf"), tl.float32)
    index = tl.zeros(x[0].shape, tl.int32)
    count = tl.zeros(x[0].shape, tl.int32)
    for i in tl.static_range(8):
        loss = weight[FIRST + i] * x[FIRST + i] * x[FIRST + i]
        index = tl.where(loss < least, i, index)
        least = tl.where(loss < least, loss, least)
        count += minus >> i & 1
    return tl.where(count % 2 == 1, index, 8)


@triton.jit(do_not_specialize=["count", "columns"])
def _prepare(
    src,
    importance,
    sigma2,
    magnitude,
    weight,
    signs,
    start,
    count,
    columns,
    SIZE: tl.constexpr,
    BASE: tl.constexpr,
    PLAIN: tl.constexpr,
    EVEN: tl.constexpr,
    LEAST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < count
    x = elements(src, lane, mask, SIZE)
    w = ()
    if WEIGHTED:
        w = spread_columns(x, importance, lane, columns, sigma2, 256 // SIZE, mask)
    else:
        spread = tl.zeros((LANES,), tl.float32)
        if PLAIN > 0:
            spread = PLAIN * tl.load(sigma2 + lane // (256 // SIZE), mask=mask, other=0.0)
        for i in tl.static_range(SIZE):
            w = w + (spread + x[i] * x[i],)
    size = ()
    for eight in tl.static_range(SIZE // 8):
        minus = tl.zeros((LANES,), tl.int32)
        for i in tl.static_range(8):
            minus = minus | (x[8 * eight + i] < 0.0).to(tl.int32) << i
        flip = tl.full((LANES,), 8, tl.int32)
        if EVEN:
            flip = _even_signs(x, w, minus, 8 * eight)
        for i in tl.static_range(8):
            plus = tl.abs(x[8 * eight + i])
            size = size + (tl.where(flip == i, 0.0 - plus, plus),)
        minus = minus ^ tl.where(flip < 8, 1 << flip, 0)
        tl.store(signs + lane * (SIZE // 8) + eight, minus.to(tl.uint8), mask=mask)
    largest = tl.full((LANES,), float("-inf"), tl.float32)
    for i in tl.static_range(SIZE):
        largest = tl.where(size[i] > largest, size[i], largest)
        tl.store(magnitude + lane * SIZE + i, size[i], mask=mask)
        tl.store(weight + lane * SIZE + i, w[i], mask=mask)
    # A bound below the smallest normal number would be a float64 as a literal.
    searched = largest >= tl.full((LANES,), LEAST, tl.int32).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full((LANES,), 2 * BASE - 1, tl.float32))
    tl.store(start + lane, scale, mask=mask)
    tl.store(start + count + lane, tl.where(searched, largest, 0.0), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _try(
    magnitude,
    weight,
    start,
    grids,
    entries,
    candidates,
    sums,
    moved,
    count,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    BASE: tl.constexpr,
    LANES: tl.constexpr,
):
    count = count.to(tl.int64)  # weights beyond 2**31 bytes
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < count * COUNT
    sub = lane // COUNT
    largest = tl.load(start + count + sub, mask=mask, other=0.0)
    factor, scale = candidate(grids, lane % COUNT, largest)
    sum_qx, sum_q2 = tl.zeros_like(scale), tl.zeros_like(scale)
    any_moved = tl.zeros((LANES,), tl.int32)
    for first in range(0, SIZE, GROUP):
        x = group_of(magnitude, sub * SIZE + first, mask, GROUP)
        w = group_of(weight, sub * SIZE + first, mask, GROUP)
        code = place(x, w, factor, scale, entries, candidates, largest > 0.0, BASE)
        sum_qx, sum_q2 = add_errors(x, w, code, sum_qx, sum_q2, BASE)
        any_moved = any_moved | (code < 0).to(tl.int32)
    tl.store(sums + lane, sum_qx, mask=mask)
    tl.store(sums + count * COUNT + lane, sum_q2, mask=mask)
    tl.store(moved + lane, any_moved.to(tl.uint8), mask=mask)


def search(name: str, weight: Tensor, importance: Tensor | None) -> Found:
    """Search the super-blocks of (R, K) rows, K a multiple of 256; importance is (K,) float32."""
    rule, grid, device = RULES[name], grid_named(name), weight.device
    size, count = rule.size, weight.numel() // rule.size
    magnitude = torch.empty((count, size), dtype=torch.float32, device=device)
    errors = torch.empty_like(magnitude)  # their weights
    signs = torch.empty((count, size // 8), dtype=torch.uint8, device=device)
    start = torch.empty((2, count), dtype=torch.float32, device=device)
    number, warps = lanes(name)
    launch(
        _prepare,
        -(-count // number),
        warps,
        weight,
        weight if importance is None else importance,
        mean_squares(weight, SUPER_BLOCK, rule.sigma),
        magnitude,
        errors,
        signs,
        start,
        count,
        weight.shape[1] // size,
        SIZE=size,
        BASE=grid.base,
        PLAIN=rule.plain or 0,
        EVEN=rule.even,
        LEAST=int(np.float32(rule.least).view(np.int32)),
        WEIGHTED=importance is not None,
        LANES=number,
    )
    if rule.fitted:
        fit_start(magnitude, errors, start, _TRIALS, grid.base)
    grids, (entries, candidates, _) = grids_of(name, device), tables_of(name, device)
    sums = torch.empty((2, count, grids.numel()), dtype=torch.float32, device=device)
    moved = torch.empty((count, grids.numel()), dtype=torch.uint8, device=device)
    launch(
        _try,
        -(-moved.numel() // _TRIALS.number),
        _TRIALS.warps,
        magnitude,
        errors,
        start,
        grids,
        entries,
        candidates,
        sums,
        moved,
        count,
        SIZE=size,
        COUNT=grids.numel(),
        GROUP=grid.group,
        BASE=grid.base,
        LANES=_TRIALS.number,
    )
    tried = Tried(magnitude, errors, start, sums, moved, grids, signs)
    scale, point, signs = choose(name, tried, _TRIALS)
    shape = (count * size // SUPER_BLOCK, SUPER_BLOCK // size)
    return Found(
        scale.reshape(shape),
        point.reshape(*shape, point.shape[1]),
        signs.reshape(*shape, size // 8),
        (start[1] == 0).reshape(shape),
    )
