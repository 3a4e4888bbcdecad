"""What the search of the IQ2 and IQ3 formats keeps: the candidate that fits best, placed anew.

Kernels behind those of iq_search.py, which says what is in memory. First the best candidate of
every sub-block; then its groups and the same ones at the scale found, one in each lane; then what
is stored.

    choice  (2, S) int32: the best candidate, -1 for none, and whether groups are placed anew
    codes   (2, S, groups) int32 of grid points: at the best candidate's scale, at the scale found
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.iq_candidates import grid_named
from diffquant.quant.codecs.iq_search import RULES
from diffquant.quant.codecs.triton.iq_nearest import (
    add_errors,
    candidate,
    group_of,
    place,
    point_of,
    tables_of,
)
from diffquant.quant.codecs.triton.launch import Lanes, launch

__all__ = ["Tried", "choose"]

_REFINE = {"all": 0, "all if any": 1, "off grid": 2}


class Tried(NamedTuple):
    """What iq_search.py tried, its names; and levels of candidates, (S, size / 8) sign bits."""

    magnitude: Tensor
    weight: Tensor
    start: Tensor
    sums: Tensor
    moved: Tensor
    grids: Tensor
    minus: Tensor


@triton.jit(do_not_specialize=["count"])
def _best(
    sums,
    moved,
    start,
    scales,
    choice,
    count,
    COUNT: tl.constexpr,
    REFINE: tl.constexpr,
    LANES: tl.constexpr,
):
    count = count.to(tl.int64)  # weights beyond 2**31 bytes
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < count
    scale = tl.load(start + lane, mask=mask, other=0.0)
    searched = tl.load(start + count + lane, mask=mask, other=0.0) > 0.0
    best, step = tl.zeros_like(scale), tl.full((LANES,), -1, tl.int32)
    for at in range(COUNT):
        sum_qx = tl.load(sums + lane * COUNT + at, mask=mask, other=0.0)
        sum_q2 = tl.load(sums + count * COUNT + lane * COUNT + at, mask=mask, other=0.0)
        fit = tl.div_rn(sum_qx, sum_q2)
        better = (sum_q2 > 0.0) & (sum_qx * sum_qx > best * sum_q2)
        scale = tl.where(better, fit, scale)
        best = tl.where(better, fit * sum_qx, best)
        step = tl.where(better, at, step)
    off = tl.load(moved + lane * COUNT + step, mask=mask & (step >= 0), other=0) != 0
    again = searched & (scale > 0.0)
    if REFINE == 1:
        again = again & (off | (step < 0))
    if REFINE == 2:
        again = again & off
    tl.store(scales + lane, scale, mask=mask)
    tl.store(choice + lane, step, mask=mask)
    tl.store(choice + count + lane, again.to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _place(
    magnitude,
    weight,
    start,
    grids,
    entries,
    candidates,
    scales,
    choice,
    codes,
    count,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BASE: tl.constexpr,
    LOWEST: tl.constexpr,
    LANES: tl.constexpr,
):
    count = count.to(tl.int64)  # weights beyond 2**31 bytes
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < 2 * count * GROUPS
    anew = lane >= count * GROUPS
    group = tl.where(anew, lane - count * GROUPS, lane)
    sub = group // GROUPS
    largest = tl.load(start + count + sub, mask=mask, other=0.0)
    step = tl.load(choice + sub, mask=mask, other=-1)
    again = tl.load(choice + count + sub, mask=mask, other=0) != 0
    factor, scale = candidate(grids, tl.maximum(step, 0), largest)
    found = tl.load(scales + sub, mask=mask, other=0.0)
    inverse = tl.div_rn(tl.full((LANES,), 1.0, tl.float32), found)
    factor = tl.where(anew, inverse, factor)
    scale = tl.where(anew, found, scale)
    x = group_of(magnitude, group * GROUP, mask, GROUP)
    w = group_of(weight, group * GROUP, mask, GROUP)
    placed = tl.where(anew, again, (largest > 0.0) & (step >= 0))
    code = place(x, w, factor, scale, entries, candidates, placed, BASE)
    code = tl.where((step < 0) & (anew == 0), LOWEST, code)
    tl.store(codes + lane, code, mask=mask)


@triton.jit(do_not_specialize=["count"])
def _store(
    magnitude,
    weight,
    start,
    choice,
    codes,
    points,
    minus,
    scales,
    point,
    signs,
    count,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BASE: tl.constexpr,
    REFINE: tl.constexpr,
    LANES: tl.constexpr,
):
    count = count.to(tl.int64)  # weights beyond 2**31 bytes
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < count
    scale = tl.load(scales + lane, mask=mask, other=0.0)
    searched = tl.load(start + count + lane, mask=mask, other=0.0) > 0.0
    again = tl.load(choice + count + lane, mask=mask, other=0) != 0
    sum_qx, sum_q2 = tl.zeros_like(scale), tl.zeros_like(scale)
    for at in range(GROUPS):
        group = lane * GROUPS + at
        code = tl.load(codes + group, mask=mask, other=0)
        anew = tl.load(codes + count * GROUPS + group, mask=mask, other=0)
        code = tl.where(again & ((REFINE != 2) | (code < 0)), anew, code)
        x = group_of(magnitude, group * GROUP, mask, GROUP)
        w = group_of(weight, group * GROUP, mask, GROUP)
        sum_qx, sum_q2 = add_errors(x, w, code, sum_qx, sum_q2, BASE)
        index = point_of(code, points, mask & searched, GROUP, BASE)
        tl.store(point + group, index.to(tl.int16), mask=mask)
    scale = tl.where(again & (sum_q2 > 0.0), tl.div_rn(sum_qx, sum_q2), scale)
    tl.store(scales + lane, tl.where(searched, tl.abs(scale), 0.0), mask=mask)
    turned = tl.where(scale < 0.0, 255, 0)
    EIGHTS: tl.constexpr = GROUPS * GROUP // 8
    for eight in tl.static_range(EIGHTS):
        byte = tl.load(minus + lane * EIGHTS + eight, mask=mask, other=0).to(tl.int32)
        byte = tl.where(searched, byte ^ turned, 0)
        tl.store(signs + lane * EIGHTS + eight, byte.to(tl.uint8), mask=mask)


def choose(name: str, tried: Tried, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor]:
    """Choose among candidates, for a key of RULES.

    Returns:
        scales (S,), not negative; points (S, groups) int16; signs (S, size / 8).
    """
    magnitude, weight, start, sums, moved, grids, minus = tried
    grid, refine, device = grid_named(name), _REFINE[RULES[name].refine], magnitude.device
    entries, candidates, points = tables_of(name, device)
    count, groups = len(magnitude), magnitude.shape[1] // grid.group
    number, warps = lanes
    scales = torch.empty(count, dtype=torch.float32, device=device)
    choice = torch.empty((2, count), dtype=torch.int32, device=device)
    programs = -(-count // number)
    launch(
        _best,
        programs,
        warps,
        sums,
        moved,
        start,
        scales,
        choice,
        count,
        COUNT=grids.numel(),
        REFINE=refine,
        LANES=number,
    )
    codes = torch.empty((2, count, groups), dtype=torch.int32, device=device)
    numbers = {"GROUPS": groups, "GROUP": grid.group, "BASE": grid.base, "LANES": number}
    launch(
        _place,
        -(-codes.numel() // number),
        warps,
        magnitude,
        weight,
        start,
        grids,
        entries,
        candidates,
        scales,
        choice,
        codes,
        count,
        LOWEST=sum(1 << grid.code_bits * i for i in range(grid.group)),
        **numbers,
    )
    point = torch.empty((count, groups), dtype=torch.int16, device=device)
    signs = torch.empty_like(minus)
    launch(
        _store,
        programs,
        warps,
        magnitude,
        weight,
        start,
        choice,
        codes,
        points,
        minus,
        scales,
        point,
        signs,
        count,
        REFINE=refine,
        **numbers,
    )
    return scales, point, signs
