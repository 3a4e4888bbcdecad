"""Device functions: grid points for groups of magnitudes, one group in each lane.

Points are looked up, and where levels are no grid point, their candidates are compared one after
another, as many times as the lane with most of them needs. A point travels as its code
(iq_candidates.code_tables), which is negative where its group's levels were off the grid.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.iq_candidates import code_tables, grid_named
from diffquant.quant.codecs.iq_search import RULES
from diffquant.quant.codecs.triton.numbers import usable

__all__ = ["add_errors", "candidate", "grids_of", "group_of", "place", "point_of", "tables_of"]

_COUNT_BITS = tl.constexpr(9)  # of an entry: how many candidates
_COUNT = tl.constexpr((1 << 9) - 1)
_MOVED = tl.constexpr(-(2**31))
_MAGIC = tl.constexpr(12582912.0)  # as in nearest_int


@triton.jit
def group_of(src, first, mask, SIZE: tl.constexpr):
    """SIZE float32 from place `first` of every lane on, as a tuple; 0 outside the mask."""
    found = ()
    for i in tl.static_range(SIZE):
        found = found + (tl.load(src + first + i, mask=mask, other=0.0),)
    return found


@triton.jit
def _odd(code, AT: tl.constexpr, BITS: tl.constexpr):
    """Field AT of a code, an odd number, as float32: the fraction of a float from 2**23 on."""
    bits = code >> (AT * BITS) & ((1 << BITS) - 1)
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _combination(x, factor, BASE: tl.constexpr):
    """nearest_int((factor * x - 1) / 2) cut to 0..BASE - 1, as digits, the first the lowest."""
    factor, found = usable(factor), tl.zeros(x[0].shape, tl.int32)
    for i in tl.static_range(len(x)):
        value = 0.5 * (factor * x[len(x) - 1 - i] - 1.0)
        bits = (value + _MAGIC).to(tl.int32, bitcast=True) & 0x7FFFFF
        found = found * BASE + tl.minimum(tl.maximum(bits - 0x400000, 0), BASE - 1)
    return found


@triton.jit
def _terms(x, root, scale, ODD: tl.constexpr):
    """Weighted squared errors of all elements at the level that ODD stands for."""
    found, value = (), scale * ODD
    for i in tl.static_range(len(x)):
        diff = value - x[i]
        found = found + (root[i] * diff * diff,)
    return found


@triton.jit
def place(x, weight, factor, scale, entries, candidates, mask, BASE: tl.constexpr):
    """Codes of the grid points of groups, at a scale.

    Args:
        x: magnitudes, a tuple.
        weight: of their squared errors, a tuple.
        factor: the inverse of the scale.
        scale: of every lane.
        entries: of combinations.
        candidates: codes.
        mask: lanes of which something comes.
        BASE: number of levels.
    """
    BITS: tl.constexpr = 3 if BASE == 3 else 4
    entry = tl.load(entries + _combination(x, factor, BASE))
    off = mask & (entry < 0)
    count = tl.where(off, -entry & _COUNT, 0)
    candidates += tl.where(off, -entry >> _COUNT_BITS, 0)
    root = ()
    for i in tl.static_range(len(x)):
        root = root + (tl.sqrt_rn(weight[i]),)
    chosen = tl.load(candidates)
    best = tl.full(scale.shape, 3.4028234663852886e38, tl.float32)  # the largest float32
    # Three levels are few enough to have their errors at hand: 1, 3 and 5 differ in two bits.
    ones, threes, fives = (), (), ()
    if BASE == 3:
        ones, threes = _terms(x, root, scale, 1.0), _terms(x, root, scale, 3.0)
        fives = _terms(x, root, scale, 5.0)
    for at in range(tl.max(count, axis=0)):
        there = at < count
        code = tl.load(candidates + at, mask=there, other=0)
        distance = tl.zeros_like(best)
        for i in tl.static_range(len(x)):
            if BASE == 3:
                term = tl.where((code & (2 << (3 * i))) != 0, threes[i], ones[i])
                distance = distance + tl.where((code & (4 << (3 * i))) != 0, fives[i], term)
            else:
                diff = scale * _odd(code, i, BITS) - x[i]
                distance = distance + root[i] * diff * diff
        nearer = there & (distance < best)
        best = tl.where(nearer, distance, best)
        chosen = tl.where(nearer, code, chosen)
    return tl.where(off, chosen | _MOVED, entry)


@triton.jit
def candidate(grids, at, largest):
    """Inverse of a candidate scale, and the scale; anything where a sub-block is not searched."""
    intervals = tl.load(grids + at)
    factor = tl.div_rn(intervals, tl.where(largest > 0.0, largest, 1.0))
    return factor, tl.div_rn(tl.full(factor.shape, 1.0, tl.float32), factor)


@triton.jit
def add_errors(x, weight, code, sum_qx, sum_q2, BASE: tl.constexpr):
    """Sums of weight * x * q and weight * q * q, with another group's."""
    BITS: tl.constexpr = 3 if BASE == 3 else 4
    for i in tl.static_range(len(x)):
        odd = _odd(code, i, BITS)
        sum_qx = sum_qx + weight[i] * x[i] * odd
        sum_q2 = sum_q2 + weight[i] * odd * odd
    return sum_qx, sum_q2


@triton.jit
def point_of(code, points, mask, GROUP: tl.constexpr, BASE: tl.constexpr):
    """Indices of the grid points that codes stand for, 0 outside the mask."""
    BITS: tl.constexpr = 3 if BASE == 3 else 4
    found = tl.zeros(code.shape, tl.int32)
    for i in tl.static_range(GROUP):
        field = code >> ((GROUP - 1 - i) * BITS) & ((1 << BITS) - 1)
        found = found * BASE + (field >> 1)
    return tl.load(points + found, mask=mask, other=0)


@functools.cache
def tables_of(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Entries and points by combination, and candidates, all int32: entries, candidates, points."""
    grid = grid_named(name)
    entries, candidates = code_tables(grid, 1, _COUNT_BITS.value)
    tables = (entries, candidates.reshape(-1), grid.point.copy())
    found = tuple(torch.from_numpy(table).to(device) for table in tables)
    return found[0], found[1], found[2]


@functools.cache
def grids_of(name: str, device: torch.device) -> Tensor:
    """Levels of which each candidate puts the largest magnitude on the highest: (n,) float32."""
    rule = RULES[name]
    offsets = np.float32(rule.step) * np.arange(-rule.steps, rule.steps + 1, dtype=np.float32)
    return torch.from_numpy(np.float32(2 * grid_named(name).base - 1) + offsets).to(device)
