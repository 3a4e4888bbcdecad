"""ggml's search for the IQ2 and IQ3 formats: signs, a scale per sub-block, grid points.

All sub-blocks are searched side by side: arrays are (n, N), column by column a sub-block, and
loops over n add in ggml's order, so every float32 rounding is ggml's. The five formats share one
method and differ in the numbers of their `Rule`. Source: ggml-quants.c
quantize_row_{iq2_xxs,iq2_xs,iq2_s,iq3_xxs,iq3_s}_impl, make_qp_quants,
iq2_find_best_neighbour, iq3_find_best_neighbour, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Int32
from diffquant.quant.codecs.fields import nearest_int
from diffquant.quant.codecs.iq_candidates import Grid, grid_named
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS, sum_rows

__all__ = ["RULES", "SUPER_BLOCK", "Found", "Rule", "scale_levels", "search"]

SUPER_BLOCK = 256
_F = np.float32
_LARGEST = np.finfo(np.float32).max
_FIT_LEVEL = 4  # make_qp_quants' largest level, for iq2_xxs


@dataclass(frozen=True, slots=True)
class Rule:
    """What distinguishes the formats.

    Attributes:
        size: weights of a sub-block.
        steps: candidate scales on each side of the first.
        step: distance of candidates, in levels.
        sigma: factor of the super-block's mean square in the error's weight.
        plain: the same without importance; None where there is no such mode.
        even: whether only seven of eight signs are stored, the last one making the count of minus
            signs even: the weight that matters least changes its sign.
        least: sub-blocks with nothing as large are empty.
        fitted: whether candidates start from a fit on levels 0 to 4, not from the largest weight.
        refine: groups that are placed anew at the scale found: "all", "all if any" was off the
            grid, or those "off grid".
        fudge: factor of the super-block's scale.
    """

    size: int
    steps: int
    step: float
    sigma: float
    plain: float | None
    even: bool
    least: float
    fitted: bool
    refine: Literal["all", "all if any", "off grid"]
    fudge: float


_ANY = 1e-45  # the smallest float: only zeros are below it
RULES = {
    "iq2_xxs": Rule(32, 6, 0.1, 1, None, True, float(GROUP_MAX_EPS), True, "all", 1),
    "iq2_xs": Rule(16, 9, 0.1, 1, None, True, float(GROUP_MAX_EPS), False, "off grid", 1),
    "iq2_s": Rule(16, 9, 0.1, 2, 0.25, False, 1e-8, False, "off grid", 0.9875),
    "iq3_xxs": Rule(32, 15, 0.2, 2, 0, True, 1e-8, False, "off grid", 1.0125),
    "iq3_s": Rule(32, 9, 0.2, 2, 0, False, _ANY, False, "all if any", 1.033),
}


@dataclass(frozen=True, slots=True)
class Found:
    """Sub-blocks as they will be stored.

    Attributes:
        scale: (B, sub-blocks) float32, not negative.
        point: (B, sub-blocks, size / group) grid indices, 0 where empty.
        signs: (B, sub-blocks, size / 8) bytes, bit j set where weight j is negative; bit 7 is to be
            left out where the rule says `even`. 0 where empty.
        empty: (B, sub-blocks) no scale was searched.
    """

    scale: Float32
    point: Int32
    signs: Bytes
    empty: NDArray[np.bool_]

    @property
    def used(self) -> NDArray[np.bool_]:
        """Super-blocks with any scale, (B, 1)."""
        used: NDArray[np.bool_] = self.scale.max(axis=1, keepdims=True) > 0
        return used


def search(name: str, blocks: Float32, importance: Float32 | None) -> Found:
    """Search super-blocks.

    Args:
        name: a key of RULES.
        blocks: (B, 256).
        importance: (C, 256) of the C super-blocks in a row, B a multiple of C; or None.

    Magnitudes are compared with odd numbers times a scale: levels 0, 1, 2 .. at 1, 3, 5 .. of it.
    """
    rule, grid = RULES[name], grid_named(name)
    x = np.ascontiguousarray(blocks.reshape(-1, rule.size).T)  # (size, N)
    weight = _weights(rule, blocks, x, importance)
    magnitude, signs = _split_signs(x, weight, even=rule.even)
    largest = magnitude.max(axis=0)
    empty = largest < _F(rule.least)
    top = _F(2 * grid.base - 1)
    if rule.fitted:
        start = _fit(magnitude, weight)
        largest = start * _F(grid.base)
        empty |= largest <= 0
    else:
        start = largest / top
    scale, point, off = _best_candidate(rule, grid, magnitude, weight, start, largest, top)
    scale, point = _refine(rule, grid, magnitude, weight, scale, point, off)
    negative = scale < 0
    signs = np.where(negative, ~signs, signs)
    scale = np.where(empty, _F(0), np.where(negative, -scale, scale))
    shape = (len(blocks), SUPER_BLOCK // rule.size)
    return Found(
        scale.reshape(shape),
        np.where(empty, 0, point).T.reshape(*shape, -1),
        np.where(empty, np.uint8(0), signs).T.reshape(*shape, -1),
        empty.reshape(shape),
    )


def scale_levels(name: str, found: Found) -> tuple[Float32, Bytes]:
    """Round the scales of sub-blocks to 4 bits.

    Returns:
        d (B,) before it becomes float16, 0 where no sub-block has a scale; levels (B, sub-blocks):
        level l stands for 2 l + 1.
    """
    step = found.scale.max(axis=1) / _F(31)
    ratio = (_F(1) / step)[:, None] * found.scale
    levels = np.clip(nearest_int(_F(0.5) * (ratio - _F(1))), 0, 15)
    d = step * _F(RULES[name].fudge)
    return np.where(found.used[:, 0], d, _F(0)), np.where(found.used, levels, 0).astype(np.uint8)


def _weights(rule: Rule, blocks: Float32, x: Float32, importance: Float32 | None) -> Float32:
    columns = blocks.T
    sigma = _F(rule.sigma) * sum_rows(columns * columns) / _F(SUPER_BLOCK)  # (B,)
    sigma = sigma.repeat(SUPER_BLOCK // rule.size)
    if importance is not None:
        columns = np.tile(importance, (len(blocks) // len(importance), 1)).reshape(-1, rule.size).T
        weight: Float32 = columns * np.sqrt(sigma + x * x)
        return weight
    assert rule.plain is not None
    return _F(rule.plain) * sigma + x * x if rule.plain else x * x


def _split_signs(x: Float32, weight: Float32, *, even: bool) -> tuple[Float32, Bytes]:
    """Magnitudes (size, N), at most one of eight negative, and signs (size / 8, N)."""
    minus = x < 0
    magnitude = np.where(minus, -x, x)
    if even:
        eights = minus.reshape(-1, 8, x.shape[1])
        loss = (weight * x * x).reshape(eights.shape)
        flip = np.arange(8)[:, None] == loss.argmin(axis=1)[:, None]
        flip &= eights.sum(axis=1, keepdims=True) % 2 == 1
        flip = flip.reshape(x.shape)
        magnitude = np.where(flip, -magnitude, magnitude)
        minus = minus ^ flip
    bits = minus.reshape(-1, 8, x.shape[1])
    return magnitude, np.packbits(bits, axis=1, bitorder="little")[:, 0]


def _fit(x: Float32, weight: Float32) -> Float32:
    """A scale so that x is near `scale * level`, level in 0..4, (N,) not negative.

    Nine grids around the one that reaches the largest element; from the best, one level at a time
    is changed while that makes a least squares fit better.
    """
    most = _F(_FIT_LEVEL)
    largest = np.maximum(x.max(axis=0), _F(0))
    iscale = most / largest
    # ggml keeps these levels in bytes, where a negative one wraps.
    levels = nearest_int(iscale * x).astype(np.uint8).astype(np.float32)
    error = _fit_error(x, weight, levels, _F(1) / iscale)
    for step in (*range(-4, 0), *range(1, 5)):
        trial = (_F(0.1) * _F(step) + most) / largest
        level = np.minimum(nearest_int(trial * x), _FIT_LEVEL).astype(np.float32)
        trial_error = _fit_error(x, weight, level, _F(1) / trial)
        better = trial_error < error
        error = np.where(better, trial_error, error)
        iscale = np.where(better, trial, iscale)
    level = np.minimum(nearest_int(iscale * x), _FIT_LEVEL).astype(np.float32)
    sum_lx, sum_l2 = sum_rows(weight * x * level), sum_rows(weight * level * level)
    levels = (level.astype(np.int32) & 255).astype(np.float32)
    for _ in range(5):
        for i in range(len(x)):
            w = weight[i]
            rest_lx, rest_l2 = sum_lx - w * x[i] * levels[i], sum_l2 - w * levels[i] * levels[i]
            wanted = np.minimum(nearest_int(x[i] * rest_l2 / rest_lx), _FIT_LEVEL)
            level = wanted.astype(np.float32)
            new_lx, new_l2 = rest_lx + w * x[i] * level, rest_l2 + w * level * level
            better = (rest_lx > 0) & (rest_l2 > 0) & (level != levels[i])
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            levels[i] = np.where(better, (wanted & 255).astype(np.float32), levels[i])
            sum_lx, sum_l2 = np.where(better, new_lx, sum_lx), np.where(better, new_l2, sum_l2)
    none = largest < GROUP_MAX_EPS
    return np.where((sum_l2 > 0) & ~none, sum_lx / sum_l2, _F(0))


def _fit_error(x: Float32, weight: Float32, level: Float32, scale: Float32) -> Float32:
    diff = x - scale * level
    return sum_rows(weight * diff * diff)


def _best_candidate(
    rule: Rule,
    grid: Grid,
    x: Float32,
    weight: Float32,
    start: Float32,
    largest: Float32,
    top: np.float32,
) -> tuple[Float32, Int32, NDArray[np.bool_]]:
    """Try scales around the one that puts `largest` on the highest level.

    Returns:
        scale (N,), of either sign; points (groups, N); whether their levels had been off the grid.
    """
    scale, best = start, np.zeros_like(start)
    groups = len(x) // grid.group
    point = np.zeros((groups, x.shape[1]), np.int32)
    off = np.full(point.shape, rule.refine == "all if any")
    for step in range(-rule.steps, rule.steps + 1):
        iscale = (top + _F(rule.step) * _F(step)) / largest
        trial, trial_off = _place(grid, x, weight, iscale, _F(1) / iscale)
        sum_qx, sum_q2 = _sums(grid, x, weight, trial)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scale = np.where(better, sum_qx / sum_q2, scale)
        best = np.where(better, scale * sum_qx, best)
        point = np.where(better, trial, point)
        off = np.where(better, trial_off, off)
    return scale, point, off


def _refine(
    rule: Rule,
    grid: Grid,
    x: Float32,
    weight: Float32,
    scale: Float32,
    point: Int32,
    off: NDArray[np.bool_],
) -> tuple[Float32, Int32]:
    """Place groups anew at the scale found, and fit the scale to the points once more."""
    again, _ = _place(grid, x, weight, _F(1) / scale, scale)
    wanted = scale > 0
    if rule.refine != "all":
        wanted &= off.any(axis=0)
    moved = wanted & off if rule.refine == "off grid" else wanted
    point = np.where(moved, again, point)
    sum_qx, sum_q2 = _sums(grid, x, weight, point)
    return np.where(wanted & (sum_q2 > 0), sum_qx / sum_q2, scale), point


def _sums(grid: Grid, x: Float32, weight: Float32, point: Int32) -> tuple[Float32, Float32]:
    """Sums of weight * x * q and weight * q * q over a sub-block, q the points' odd numbers."""
    q = (2 * grid.levels[point].astype(np.float32) + 1).transpose(0, 2, 1).reshape(x.shape)
    return sum_rows(weight * x * q), sum_rows(weight * q * q)


def _place(
    grid: Grid, x: Float32, weight: Float32, iscale: Float32, scale: Float32
) -> tuple[Int32, NDArray[np.bool_]]:
    """Round to levels, and groups of levels to grid points.

    Returns:
        points (groups, N); whether the levels were off the grid.
    """
    levels = np.clip(nearest_int(_F(0.5) * (iscale * x - _F(1))), 0, grid.base - 1)
    digits = (grid.base ** np.arange(grid.group))[:, None]
    key = (levels.reshape(-1, grid.group, x.shape[1]) * digits).sum(axis=1)  # (groups, N)
    point = grid.point[key]
    off = point < 0
    group, column = np.nonzero(off)
    by_group = (-1, grid.group, x.shape[1])
    point[group, column] = _nearest(
        grid,
        key[group, column],
        x.reshape(by_group)[group, :, column].T,
        np.sqrt(weight).reshape(by_group)[group, :, column].T,
        scale[column],
    )
    return point, off


def _nearest(
    grid: Grid, key: NDArray[np.int64], x: Float32, weight: Float32, scale: Float32
) -> Int32:
    """Of each group's candidates the one of least weighted error, of equals the first.

    Args:
        grid: of the format.
        key: (M,) combinations off the grid.
        x: (group, M) magnitudes.
        weight: (group, M) of their squared errors.
        scale: (M,).
    """
    count = grid.first[key + 1] - grid.first[key]
    order = np.argsort(-count, kind="stable")  # those with a j-th candidate stand in front
    x, weight, scale, key = x[:, order], weight[:, order], scale[order], key[order]
    odd = 2 * grid.levels.T.astype(np.float32) + 1  # (group, points)
    first = grid.first[key]
    chosen = grid.candidates[first]
    best = np.full(len(key), _LARGEST)
    for j in range(int(count.max(initial=0))):
        n = int((count > j).sum())
        candidate = grid.candidates[first[:n] + j]
        diff = scale[:n] * odd[:, candidate] - x[:, :n]
        distance = sum_rows(weight[:, :n] * diff * diff)
        nearer = distance < best[:n]
        best[:n] = np.where(nearer, distance, best[:n])
        chosen[:n] = np.where(nearer, candidate, chosen[:n])
    result = np.empty_like(chosen)
    result[order] = chosen
    return result
