"""Fast twin of codecs/iq_search.py: four or eight super-blocks at a time, 64 sub-blocks in lanes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Int32, frozen
from diffquant.quant.codecs.iq_grids import grid_named
from diffquant.quant.codecs.iq_search import RULES, SUPER_BLOCK, Found
from diffquant.quant.codecs.numba import iq_lanes as lanes
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.iq_nearest import Tables, place, tables_named
from diffquant.quant.codecs.numba.lanes import LANES, scratch

__all__ = ["search"]

_REFINE = ("all", "all if any", "off grid")
_ALL, _ANY, _OFF = np.int32(0), np.int32(1), np.int32(2)
_ZERO = np.float32(0)
_ONE = np.float32(1)

# size, candidates on each side, step, sigma, plain, even, least, fitted, refine, fields' bits, base
Numbers = tuple[
    int,
    int,
    np.float32,
    np.float32,
    np.float32,
    bool,
    np.float32,
    bool,
    np.int32,
    np.int32,
    np.int32,
]


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
    size, sigma = numbers[0], numbers[3]
    subs = SUPER_BLOCK // size
    for b in range(LANES // subs):
        total[b] = _ZERO
    for i in range(SUPER_BLOCK):
        for b in range(count):
            x = blocks[start + b, i]
            total[b] = np.float32(total[b] + np.float32(x * x))
    for b in range(LANES // subs):
        mean = np.float32(np.float32(sigma * total[b]) / np.float32(SUPER_BLOCK))
        for j in range(subs):
            lane = subs * b + j
            state[lanes.SIGMA, lane] = mean
            for i in range(size):
                grid[i, lane] = blocks[start + b, size * j + i] if b < count else _ZERO
            if importance.shape[0] > 0:
                row = (start + b) % importance.shape[0]
                for i in range(size):
                    grid[size + i, lane] = importance[row, size * j + i]


@inlined
def _start(state: Float32, numbers: Numbers, wanted: Int32) -> None:
    # Where candidates start, and the lanes that are searched at all.
    least, fitted, base = numbers[6], numbers[7], numbers[10]
    top = np.float32(np.int32(np.int32(2) * base - np.int32(1)))
    for k in range(LANES):
        large = state[lanes.LARGEST, k] >= least
        if fitted:
            state[lanes.LARGEST, k] = np.float32(state[lanes.SCALE, k] * np.float32(base))
            large = large and state[lanes.LARGEST, k] > _ZERO
        else:
            state[lanes.SCALE, k] = np.float32(state[lanes.LARGEST, k] / top)
        wanted[k] = np.int32(-1) if large else np.int32(0)


@inlined
def _take_best(state: Float32, code: Int32, numbers: Numbers, wanted: Int32, best: Int32) -> None:
    # Codes of the best candidate, (groups, LANES), and the lanes that are placed once more.
    refine, bits = numbers[8], numbers[9]
    groups, size = code.shape[1], numbers[0]
    lowest = np.int32(0)
    for _ in range(size // groups):
        lowest = np.int32(np.int32(lowest << bits) | np.int32(1))
    for k in range(LANES):
        step = int(state[lanes.BEST_STEP, k])
        moved = refine == _ALL or (refine == _ANY and step < 0)
        for g in range(groups):
            best[g, k] = code[step, g, k] if step >= 0 else lowest
            moved = moved or best[g, k] < np.int32(0)
        again = moved and state[lanes.SCALE, k] > _ZERO
        wanted[k] = wanted[k] if again else np.int32(0)


@inlined
def _refine(
    grid: Float32,
    state: Float32,
    numbers: Numbers,
    tables: Tables,
    wanted: Int32,
    best: Int32,
    scales: Float32,
    code: Int32,
) -> None:
    size, refine, bits, base = numbers[0], numbers[8], numbers[9], numbers[10]
    groups = best.shape[0]
    for k in range(LANES):
        scales[0, k] = np.float32(_ONE / state[lanes.SCALE, k])
        scales[1, k] = state[lanes.SCALE, k]
    lanes.combine(grid, scales[0], code[0], size // groups, base)
    place(grid, size, scales, tables, wanted, code[:1])
    for g in range(groups):
        for k in range(LANES):
            moved = refine != _OFF or best[g, k] < np.int32(0)
            best[g, k] = code[0, g, k] if moved and wanted[k] != np.int32(0) else best[g, k]
    lanes.sum_codes(grid, state, size, best, size // groups, bits)
    lanes.refit(state, wanted)


@inlined
def _point(code: np.int32, group: int, numbers: Numbers, points: Int32) -> np.int32:
    bits, base = numbers[9], numbers[10]
    mask = np.int32(np.int32(np.int32(1) << bits) - np.int32(1))
    combination = np.int32(0)
    for i in range(group):
        odd = np.int32(np.int32(code >> np.int32(bits * np.int32(group - 1 - i))) & mask)
        combination = np.int32(np.int32(combination * base) + np.int32(odd >> np.int32(1)))
    return np.int32(points[combination])


@kernel
def _search_kernel(
    blocks: Float32,
    importance: Float32,
    numbers: Numbers,
    tables: Tables,
    points: Int32,
    found: tuple[Float32, Int32, Bytes, NDArray[np.bool_]],
    grid: Float32,
    state: Float32,
    scales: Float32,
    code: Int32,
    best: Int32,
    signs: Int32,
) -> None:
    size, steps, step, even = numbers[0], numbers[1], numbers[2], numbers[5]
    bits, base = numbers[9], numbers[10]
    out_scale, out_point, out_signs, out_empty = found
    subs, groups = SUPER_BLOCK // size, code.shape[1]
    group, per = size // groups, LANES // subs
    top = np.float32(np.int32(np.int32(2) * base - np.int32(1)))
    total = np.empty(per, np.float32)
    searched, wanted = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    for start in range(0, blocks.shape[0], per):
        count = min(per, blocks.shape[0] - start)
        _load(blocks, importance, start, count, numbers, grid, state, total)
        lanes.weigh(grid, state, size, importance.shape[0] > 0, numbers[4])
        lanes.split_signs(grid, state, size, even, signs)
        if numbers[7]:
            lanes.fit_scale(grid, state, size, scales)
        _start(state, numbers, searched)
        lanes.candidate_scales(state, scales, top, steps, step)
        for n in range(2 * steps + 1):
            lanes.combine(grid, scales[2 * n], code[n], group, base)
        place(grid, size, scales, tables, searched, code)
        for n in range(2 * steps + 1):
            lanes.sum_codes(grid, state, size, code[n], group, bits)
            lanes.keep_better(state, n)
        wanted[:] = searched
        _take_best(state, code, numbers, wanted, best)
        _refine(grid, state, numbers, tables, wanted, best, scales, code)
        for lane in range(count * subs):
            b, j = start + lane // subs, lane % subs
            scale = state[lanes.SCALE, lane]
            negative = scale < _ZERO
            empty = searched[lane] == np.int32(0)
            out_empty[b, j] = empty
            out_scale[b, j] = _ZERO if empty else abs(scale)
            for g in range(groups):
                point = _point(best[g, lane], group, numbers, points) if not empty else np.int32(0)
                out_point[b, j, g] = point
            for eight in range(size // 8):
                byte = np.uint8(signs[eight, lane])
                byte = np.uint8(~byte) if negative else byte
                out_signs[b, j, eight] = np.uint8(0) if empty else byte


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
        rule.fitted,
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
    _search_kernel(
        frozen(blocks, blocks.shape),
        frozen(importance, importance.shape),
        numbers,
        tables_named(name),
        frozen(grid.point, grid.point.shape),
        found,
        scratch(4 * rule.size),
        scratch(lanes.STATE_ROWS),
        scratch(max(2 * candidates, rule.size)),
        scratch(candidates * groups).view(np.int32).reshape(candidates, groups, LANES),
        scratch(groups).view(np.int32),
        scratch(rule.size // 8).view(np.int32),
    )
    return Found(*found)
