"""A scale to start from, for IQ2_XXS: codecs/iq_search.py's fit on levels 0 to 4.

As positive_search.py, but elements and levels stay in memory: with all 32 of a sub-block written
out, the compiler takes minutes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.triton.launch import Lanes, launch
from diffquant.quant.codecs.triton.numbers import nearest_int
from diffquant.quant.codecs.triton.weighted import positive_grids

__all__ = ["fit_start"]

_TOP = tl.constexpr(4)  # make_qp_quants' largest level, for iq2_xxs


@triton.jit
def _error(magnitude, weight, first, mask, factor, FIRST: tl.constexpr, SIZE: tl.constexpr):
    # The first grid's levels are bytes that nothing cuts.
    scale = tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor)
    total = tl.zeros_like(factor)
    for i in range(SIZE):
        x = tl.load(magnitude + first + i, mask=mask, other=0.0)
        w = tl.load(weight + first + i, mask=mask, other=0.0)
        level = nearest_int(factor * x)
        level = level & 255 if FIRST else tl.minimum(level, _TOP)
        diff = x - scale * level.to(tl.float32)
        total = total + w * diff * diff
    return total


@triton.jit(do_not_specialize=["count"])
def _fit(
    magnitude,
    weight,
    levels,
    grids,
    start,
    count,
    SIZE: tl.constexpr,
    BASE: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask, first = lane < count, lane * SIZE
    largest = tl.load(start + count + lane, mask=mask, other=0.0)
    searched = largest > 0.0
    largest = tl.where(searched, largest, 1.0)  # nothing comes of it
    best = tl.div_rn(tl.zeros_like(largest) + tl.load(grids), largest)
    error = _error(magnitude, weight, first, mask, best, True, SIZE)
    for at in range(1, 9):
        factor = tl.div_rn(tl.zeros_like(largest) + tl.load(grids + at), largest)
        trial = _error(magnitude, weight, first, mask, factor, False, SIZE)
        better = trial < error
        error = tl.where(better, trial, error)
        best = tl.where(better, factor, best)
    sum_lx, sum_l2 = tl.zeros_like(largest), tl.zeros_like(largest)
    for i in range(SIZE):
        x = tl.load(magnitude + first + i, mask=mask, other=0.0)
        w = tl.load(weight + first + i, mask=mask, other=0.0)
        whole = tl.minimum(nearest_int(best * x), _TOP)
        level = whole.to(tl.float32)
        sum_lx = sum_lx + w * x * level
        sum_l2 = sum_l2 + w * level * level
        tl.store(levels + first + i, whole.to(tl.uint8), mask=mask)
    for turn in range(5 * SIZE):
        place = first + turn % SIZE
        x = tl.load(magnitude + place, mask=mask, other=0.0)
        w = tl.load(weight + place, mask=mask, other=0.0)
        have = tl.load(levels + place, mask=mask, other=0).to(tl.int32)
        level = have.to(tl.float32)
        rest_lx, rest_l2 = sum_lx - w * x * level, sum_l2 - w * level * level
        possible = (rest_lx > 0.0) & (rest_l2 > 0.0)
        wanted = tl.div_rn(x * rest_l2, tl.where(possible, rest_lx, 1.0))
        moved = tl.minimum(nearest_int(wanted), _TOP)
        to = moved.to(tl.float32)
        new_lx, new_l2 = rest_lx + w * x * to, rest_l2 + w * to * to
        gain = new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
        better = possible & (moved != have) & gain
        tl.store(levels + place, moved.to(tl.uint8), mask=mask & better)
        sum_lx = tl.where(better, new_lx, sum_lx)
        sum_l2 = tl.where(better, new_l2, sum_l2)
    scale = tl.where(searched & (sum_l2 > 0.0), tl.div_rn(sum_lx, sum_l2), 0.0)
    tl.store(start + lane, scale, mask=mask)
    largest = scale * BASE
    tl.store(start + count + lane, tl.where(largest > 0.0, largest, 0.0), mask=mask)


def fit_start(magnitude: Tensor, weight: Tensor, start: Tensor, lanes: Lanes, base: int) -> None:
    """Put fitted scales in the place of what `start` holds, see iq_search.py.

    Args:
        magnitude: (S, size) float32.
        weight: of their squared errors.
        start: (2, S), the second row the largest magnitudes.
        lanes: of a program; a lane's levels are read again by the thread that wrote them.
        base: number of levels of the grid.
    """
    count, size = magnitude.shape
    launch(
        _fit,
        -(-count // lanes.number),
        lanes.warps,
        magnitude,
        weight,
        torch.empty((count, size), dtype=torch.uint8, device=magnitude.device),
        positive_grids(_TOP.value, magnitude.device),
        start,
        count,
        SIZE=size,
        BASE=base,
        LANES=lanes.number,
    )
