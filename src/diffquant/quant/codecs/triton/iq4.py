"""Encoders of IQ4_NL and IQ4_XS: layouts as in their codecs, search as in codecs/iq4_search.py.

One lane is a sub-block of 32; of IQ4_XS eight neighbouring lanes are a
super-block.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.iq4_search import MIDPOINTS, STEPS, VALUES
from diffquant.quant.codecs.triton.importance import mean_squares, spread_columns
from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import (
    elements,
    inverse,
    nearest_int,
    nibbles,
    store_bytes,
    store_half,
)
from diffquant.quant.codecs.triton.super_blocks import largest_of
from diffquant.quant.codecs.triton.symmetric_search import largest

__all__ = ["iq4_nl", "iq4_xs"]

_VALUES = tl.constexpr(tuple(float(value) for value in VALUES))
_MIDPOINTS = tl.constexpr(tuple(float(value) for value in MIDPOINTS))


@triton.jit
def _value(scaled):
    """The nearest of the sixteen values."""
    value = tl.full(scaled.shape, _VALUES[0], tl.float32)
    for i in tl.static_range(15):
        value = tl.where(scaled >= _MIDPOINTS[i], _VALUES[i + 1], value)
    return value


@triton.jit
def _levels(x, scale):
    """Index of the nearest value of every element, at this scale."""
    factor, found = inverse(scale), ()
    for i in tl.static_range(len(x)):
        scaled = factor * x[i]
        level = tl.zeros(scaled.shape, tl.int32)
        for k in tl.static_range(15):
            level += (scaled >= _MIDPOINTS[k]).to(tl.int32)
        found = found + (level,)
    return found


@triton.jit
def _find_scale(x, weight, offsets, COUNT: tl.constexpr, WEIGHTED: tl.constexpr):
    """Scale of either sign by weighted least squares; 0 for an empty sub-block.

    Args:
        x: elements of every lane.
        weight: of their squared errors, a tuple; anything where these are the elements squared.
        offsets: (COUNT,) float32, where the candidates after the first put the peak.
        COUNT: of these candidates.
        WEIGHTED: whether `weight` is a tuple.
    """
    peak = largest(x)
    empty = tl.abs(peak) < 1e-15  # GROUP_MAX_EPS
    peak = tl.where(empty, 1.0, peak)
    one = tl.full(peak.shape, 1.0, tl.float32)
    scale, best = tl.zeros_like(peak), tl.zeros_like(peak)
    for at in range(-1, COUNT):
        # The first puts the peak at the lowest value, -127, and is kept if it fits at all.
        plain = tl.div_rn(one, tl.div_rn(peak, one * 127.0))
        offset = one * tl.load(offsets + at, mask=at >= 0, other=0.0)
        factor = tl.where(at < 0, plain, tl.div_rn(offset, peak))
        sum_qx, sum_q2 = tl.zeros_like(peak), tl.zeros_like(peak)
        for i in tl.static_range(len(x)):
            value = _value(factor * x[i])
            weighted = (weight[i] if WEIGHTED else x[i] * x[i]) * value
            sum_qx = sum_qx + weighted * x[i]
            sum_q2 = sum_q2 + weighted * value
        better = (sum_q2 > 0.0) & ((at < 0) | (sum_qx * sum_qx > best * sum_q2))
        fit = tl.div_rn(sum_qx, sum_q2)
        scale = tl.where(better, fit, scale)
        best = tl.where(better, fit * sum_qx, best)
    return tl.where(empty, 0.0, scale)


@triton.jit(do_not_specialize=["blocks", "columns"])
def _iq4_nl(
    src,
    dst,
    offsets,
    importance,
    sigma2,
    blocks,
    columns,
    COUNT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * LANES  # 64 bits: weights beyond 2**31 bytes
    src += first * 32
    dst += first * 18
    lane = tl.arange(0, LANES)
    mask = lane < blocks - first
    x = elements(src, lane, mask, 32)
    weight = x
    if WEIGHTED:
        weight = spread_columns(x, importance, first + lane, columns, sigma2, 1, mask)
    scale = _find_scale(x, weight, offsets, COUNT, WEIGHTED)
    store_half(dst, lane * 18, scale, mask)
    store_bytes(dst, lane * 18 + 2, nibbles(_levels(x, scale)), mask, tl.int16, 2)


@triton.jit(do_not_specialize=["blocks", "columns"])
def _iq4_xs(
    src,
    dst,
    offsets,
    importance,
    sigma2,
    blocks,
    columns,
    COUNT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LANES: tl.constexpr,
):
    BLOCKS: tl.constexpr = LANES // 8
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    src += first * 256
    dst += first * 136
    lane = tl.arange(0, LANES)
    exists = lane // 8 < blocks - first
    x = elements(src, lane, exists, 32)
    weight = x
    if WEIGHTED:
        weight = spread_columns(x, importance, first * 8 + lane, columns, sigma2, 8, exists)
    scale = _find_scale(x, weight, offsets, COUNT, WEIGHTED)

    block = tl.arange(0, BLOCKS)
    mask = block < blocks - first
    d = largest_of(scale, BLOCKS, 8) * (-1.0 / 32.0)  # a power of two; of zeros -0, as on the CPU
    store_half(dst, block * 136, d, mask)
    steps = nearest_int(inverse(d)[:, None] * tl.reshape(scale, (BLOCKS, 8)))
    steps = tl.minimum(tl.maximum(steps, -32), 31)
    stored = steps + 32
    upper = tl.sum(stored >> 4 << (tl.arange(0, 8) * 2)[None, :], axis=1)
    place = (dst + (block * 136 + 2)).to(tl.pointer_type(tl.int16), bitcast=True)
    tl.store(place, upper.to(tl.int16), mask=mask)
    even, odd = tl.split(tl.reshape(stored & 15, (BLOCKS, 4, 2)))
    place = dst + (block[:, None] * 136 + 4 + tl.arange(0, 4)[None, :])
    tl.store(place, (even | odd << 4).to(tl.uint8), mask=mask[:, None])

    # Levels against d before it was rounded to half precision, as ggml has it.
    scale = tl.reshape(d[:, None] * steps.to(tl.float32), (LANES,))
    place = lane // 8 * 136 + 8 + lane % 8 * 16
    store_bytes(dst, place, nibbles(_levels(x, scale)), exists, tl.int32, 4)


@functools.cache
def _offsets(device: torch.device) -> Tensor:
    """Where the candidates after the first put the peak: -134 to -120."""
    return torch.from_numpy(np.arange(-STEPS, STEPS + 1, dtype=np.float32) - 127).to(device)


def _encode(
    kernel: object,
    size: int,
    nbytes: int,
    weight: Tensor,
    stats: None = None,
    *,
    fmt: str,
    importance: Tensor | None = None,
) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of the block's size; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    blocks, (number, warps) = weight.numel() // size, lanes(fmt)
    packed = torch.empty((rows, width // size * nbytes), dtype=torch.uint8, device=weight.device)
    programs = -(-blocks * (size // 32) // number)
    offsets, weighted = _offsets(weight.device), importance is not None
    launch(
        kernel,  # type: ignore[arg-type]
        programs,
        warps,
        weight,
        packed,
        offsets,
        importance if importance is not None else weight,
        mean_squares(weight, size, 2.0) if weighted else weight,
        blocks,
        width // 32,
        COUNT=2 * STEPS + 1,
        WEIGHTED=weighted,
        LANES=number,
    )
    return {"weight": packed}


iq4_nl = functools.partial(_encode, _iq4_nl, 32, 18)
iq4_xs = functools.partial(_encode, _iq4_xs, 256, 136)
