"""Fast twin of codecs/iq_search.py: four or eight super-blocks at a time, 64 sub-blocks wide.

Where weights beyond 1e19 make distances to grid points overflow, it chooses as the reference does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Int32, frozen
from diffquant.quant.codecs.iq_candidates import grid_named
from diffquant.quant.codecs.iq_search import RULES, SUPER_BLOCK, Found
from diffquant.quant.codecs.numba import iq_lanes as lanes
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.iq_nearest import (
    Tables,
    place_eights,
    place_fours,
    tables_named,
)
from diffquant.quant.codecs.numba.lanes import LANES, scratch

__all__ = ["search"]

_REFINE = ("all", "all if any", "off grid")
_ALL, _ANY, _OFF = np.int32(0), np.int32(1), np.int32(2)
_ZERO = np.float32(0)
_ONE = np.float32(1)

# size, candidates on each side, step, sigma, plain, even, least, refine, bits of a field, base
Numbers = tuple[
    int, int, np.float32, np.float32, np.float32, bool, np.float32, np.int32, np.int32, np.int32
]
Kernel = Callable[..., None]
Outputs = tuple[Float32, Int32, Bytes, NDArray[np.bool_]]


@inlined
def _load(
    blocks: Float32,
    importance: Float32,
    start: int,
    count: int,
    numbers: Numbers,
    grid: Float32,
    state: Float32,
    total: Float32,
) -> None:
    # Rows 0.. elements, rows size.. importance; lanes beyond the last super-block are zero.
    size, sigma, plain = numbers[0], numbers[3], numbers[4]
    subs = SUPER_BLOCK // size
    for b in range(LANES // subs):
        total[b] = _ZERO
    for i in range(SUPER_BLOCK):
        for b in range(count):
            x = blocks[start + b, i]
            total[b] = total[b] + (x * x)
    for b in range(LANES // subs):
        mean = (sigma * total[b]) / np.float32(SUPER_BLOCK)
        for j in range(subs):
            lane = subs * b + j
            state[lanes.SIGMA, lane] = mean
            if importance.shape[0] == 0:
                state[lanes.SIGMA, lane] = plain * mean if plain > _ZERO else _ZERO
            for i in range(size):
                grid[i, lane] = blocks[start + b, size * j + i] if b < count else _ZERO
            if importance.shape[0] > 0:
                row = (start + b) % importance.shape[0]
                for i in range(size):
                    grid[size + i, lane] = importance[row, size * j + i]


@inlined
def _start(state: Float32, numbers: Numbers, searched: Int32) -> None:
    # Where candidates start without a fit, and the lanes that are searched at all.
    least, base = numbers[6], numbers[9]
    top = np.float32(np.int32(np.int32(2) * base - np.int32(1)))
    for k in range(LANES):
        state[lanes.SCALE, k] = state[lanes.LARGEST, k] / top
        searched[k] = np.int32(-1) if state[lanes.LARGEST, k] >= least else np.int32(0)


@inlined
def _start_fitted(grid: Float32, state: Float32, numbers: Numbers, searched: Int32) -> None:
    for k in range(LANES):
        state[lanes.LARGEST, k] = state[lanes.SCALE, k] * np.float32(numbers[9])
        if not state[lanes.LARGEST, k] > _ZERO:
            searched[k] = np.int32(0)


@inlined
def _take_best(
    state: Float32, code: Int32, last: int, numbers: Numbers, searched: Int32, wanted: Int32
) -> None:
    # Move the best candidate's codes to the last one's place, and see which lanes to place anew.
    refine, bits = numbers[7], numbers[8]
    groups, size = code.shape[1], numbers[0]
    lowest = np.int32(0)
    for _ in range(size // groups):
        lowest = np.int32(np.int32(lowest << bits) | np.int32(1))
    for k in range(LANES):
        step = int(state[lanes.BEST_STEP, k])
        moved = refine == _ALL or (refine == _ANY and step < 0)
        for g in range(groups):
            code[last, g, k] = code[step, g, k] if step >= 0 else lowest
            moved = moved or code[last, g, k] < np.int32(0)
        again = moved and state[lanes.SCALE, k] > _ZERO
        wanted[k] = searched[k] if again else np.int32(0)


@inlined
def _take_again(state: Float32, code: Int32, last: int, numbers: Numbers, wanted: Int32) -> None:
    # Candidate 0, done with, was placed anew at the scale found: keep that where it is wanted.
    for g in range(code.shape[1]):
        for k in range(LANES):
            moved = numbers[7] != _OFF or code[last, g, k] < np.int32(0)
            if moved and wanted[k] != np.int32(0):
                code[last, g, k] = code[0, g, k]


@inlined
def _point(code: np.int32, group: int, numbers: Numbers, points: Int32) -> np.int32:
    bits, base = numbers[8], numbers[9]
    mask = np.int32(np.int32(np.int32(1) << bits) - np.int32(1))
    combination = np.int32(0)
    for i in range(group):
        odd = np.int32(np.int32(code >> np.int32(bits * np.int32(group - 1 - i))) & mask)
        combination = np.int32(np.int32(combination * base) + np.int32(odd >> np.int32(1)))
    return np.int32(points[combination])


@inlined
def _store(
    start: int,
    count: int,
    state: Float32,
    code: Int32,
    signs: Int32,
    searched: Int32,
    numbers: Numbers,
    points: Int32,
    found: Outputs,
) -> None:
    scales, point, out_signs, out_empty = found
    subs, groups, last = SUPER_BLOCK // numbers[0], code.shape[1], code.shape[0] - 1
    for lane in range(count * subs):
        b, j = start + lane // subs, lane % subs
        scale, empty = state[lanes.SCALE, lane], searched[lane] == np.int32(0)
        out_empty[b, j] = empty
        scales[b, j] = _ZERO if empty else abs(scale)
        for g in range(groups):
            point[b, j, g] = np.int32(0)
            if not empty:  # else there is no code: combinations of empty sub-blocks stay
                group = numbers[0] // groups
                point[b, j, g] = _point(code[last, g, lane], group, numbers, points)
        for eight in range(signs.shape[0]):
            byte = np.int32(signs[eight, lane])
            byte = np.int32(~byte) if scale < _ZERO else byte
            out_signs[b, j, eight] = np.uint8(0) if empty else np.uint8(byte)


def _kernel_for(*, eights: bool, fitted: bool) -> Kernel:
    """Make the kernel of a kind of format: each compiles only what it needs."""

    @kernel
    def search_kernel(
        blocks: Float32,
        importance: Float32,
        numbers: Numbers,
        tables: Tables,
        points: Int32,
        found: Outputs,
        grid: Float32,
        state: Float32,
        scales: Float32,
        code: Int32,
        signs: Int32,
    ) -> None:
        size, steps, base = numbers[0], numbers[1], numbers[9]
        groups, last = code.shape[1], code.shape[0] - 1
        group, per = size // groups, LANES * size // SUPER_BLOCK
        total = np.empty(per, np.float32)
        searched, wanted = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
        for start in range(0, blocks.shape[0], per):
            count = min(per, blocks.shape[0] - start)
            _load(blocks, importance, start, count, numbers, grid, state, total)
            lanes.weigh(grid, state, size, importance.shape[0] > 0)
            lanes.split_signs(grid, state, size, numbers[5], signs)
            _start(state, numbers, searched)
            if fitted:
                lanes.fit_scale(grid, state, size, scales)
                _start_fitted(grid, state, numbers, searched)
            lanes.candidate_scales(state, scales, base, steps, numbers[2])
            for k in range(LANES):
                wanted[k] = searched[k]
            # Twice: at all candidate scales, then at the scale found, in candidate 0's place.
            for turn in range(2):
                stop = last if turn == 0 else 1
                for n in range(stop):
                    lanes.combine(grid, scales, code, n, group, base)
                for k in range(LANES):
                    for g in range(groups):
                        if wanted[k] == np.int32(0):
                            continue
                        if eights:
                            place_eights(grid, 3 * size, g, k, scales, tables, code, stop)
                        else:
                            place_fours(grid, 3 * size, g, k, scales, tables, code, stop)
                if turn == 0:
                    for n in range(last):
                        lanes.sum_codes(grid, state, size, code, n, group, numbers[8])
                        lanes.keep_better(state, n)
                    _take_best(state, code, last, numbers, searched, wanted)
                    lanes.scale_found(state, scales)
                else:
                    _take_again(state, code, last, numbers, wanted)
                    lanes.sum_codes(grid, state, size, code, last, group, numbers[8])
                    lanes.refit(state, wanted)
            _store(start, count, state, code, signs, searched, numbers, points, found)

    compiled: Kernel = search_kernel
    return compiled


# By (groups of eight, fitted) of the formats that there are.
_KERNELS = {
    (False, False): _kernel_for(eights=False, fitted=False),
    (True, False): _kernel_for(eights=True, fitted=False),
    (True, True): _kernel_for(eights=True, fitted=True),
}


def search(name: str, blocks: Float32, importance: Float32 | None) -> Found:
    """Search super-blocks, as codecs.iq_search.search does."""
    rule, grid = RULES[name], grid_named(name)
    numbers = (
        rule.size,
        rule.steps,
        np.float32(rule.step),
        np.float32(rule.sigma),
        np.float32(rule.plain or 0),
        rule.even,
        np.float32(rule.least),
        np.int32(_REFINE.index(rule.refine)),
        np.int32(grid.code_bits),
        np.int32(grid.base),
    )
    if importance is None:
        importance = np.empty((0, SUPER_BLOCK), np.float32)
    subs, groups, candidates = SUPER_BLOCK // rule.size, rule.size // grid.group, 2 * rule.steps + 1
    found = (
        np.empty((len(blocks), subs), np.float32),
        np.empty((len(blocks), subs, groups), np.int32),
        np.empty((len(blocks), subs, rule.size // 8), np.uint8),
        np.empty((len(blocks), subs), np.bool_),
    )
    _KERNELS[grid.group == 8, rule.fitted](
        frozen(blocks, blocks.shape),
        frozen(importance, importance.shape),
        numbers,
        tables_named(name),
        frozen(grid.point, grid.point.shape),
        found,
        scratch(4 * rule.size),
        scratch(lanes.STATE_ROWS),
        scratch(max(2 * candidates, rule.size)),
        scratch((candidates + 1) * groups).view(np.int32).reshape(-1, groups, LANES),
        scratch(rule.size // 8).view(np.int32),
    )
    return Found(*found)
