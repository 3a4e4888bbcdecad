"""Encoder of asym_w4a8_int8; layout and search as in codecs/asym_w4a8_int8.py.

One lane is a block of 16. Groups are rotated by a kernel of their own; then blocks are fitted; then
codes are chosen by a third kernel, since a row's scale wants all its blocks. A row's largest value
is that of bits, which are ordered as magnitudes are, NaN above infinity.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs import asym_w4a8_int8 as reference
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import elements, nearest_int, store_bytes
from diffquant.quant.codecs.triton.rotation import rotate
from diffquant.quant.formats import format_named

__all__ = ["asym_w4a8_int8"]

_CODEBOOK = tl.constexpr(tuple(float(value) for value in reference.CODEBOOK))
_SMALLEST = tl.constexpr(float(reference.SMALLEST))
_NAN = 0x7FC00000  # the bits of a processor's NaN; a card's has others


@triton.jit
def _nearest(value, levels):
    """Index of the nearest of 16 ascending levels, a tie takes the lower one; and that level.

    NaN takes the lowest.
    """
    below = tl.zeros(value.shape, tl.int32)
    low, high = tl.zeros_like(value) + levels[0], tl.zeros_like(value) + levels[0]
    for i in tl.static_range(16):
        less = levels[i] < value
        below += less.to(tl.int32)
        low = tl.where(less, levels[i], low)
        high = tl.where(less, levels[i + (i < 15)], high)
    over = tl.abs(value - high) < tl.abs(value - low)
    index = tl.where(over, tl.minimum(below, 15), tl.maximum(below - 1, 0))
    return index, tl.where(over, high, low)


@triton.jit
def _chosen(x, scale):
    """The codebook's levels that are nearest to a block's elements, at this scale."""
    found = ()
    for i in tl.static_range(16):
        _, level = _nearest(tl.div_rn(x[i], scale), _CODEBOOK)
        found = found + (level,)
    return found


@triton.jit
def _sum(a, b):
    """Sum of 16 products, in torch's order: two halves, then lane by lane."""
    total = a[0] * b[0] + a[8] * b[8]
    for i in tl.static_range(1, 8):
        total = total + (a[i] * b[i] + a[i + 8] * b[i + 8])
    return total


@triton.jit
def _at_least(value):
    return tl.where(value < _SMALLEST, _SMALLEST, value)


@triton.jit
def _size(value):
    """Bits of a magnitude."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _e4m3(value):
    """E4M3 bits of numbers from 0 on, half to even, overflow and NaN to 0x7F: int32."""
    bits = value.to(tl.int32, bitcast=True)
    normal = bits + 0x7FFFF + (bits >> 20 & 1) - ((127 - 7) << 23) >> 20
    subnormal = nearest_int(tl.where(value < 0.015625, value * 512.0, 0.0))
    code = tl.where(value < 0.015625, subnormal, normal)
    return tl.where(value <= 464.0, code, 0x7F)


@triton.jit(do_not_specialize=["blocks"])
def _fit(src, scales, most, blocks, LANES: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < blocks
    x = elements(src, lane, mask, 16)
    largest = _size(x[0])
    for i in tl.static_range(1, 16):
        largest = tl.maximum(largest, _size(x[i]))
    scale = _at_least(largest.to(tl.float32, bitcast=True))
    chosen = x
    for at in range(3):  # one search, or compiling takes twice as long
        fit = _at_least(tl.div_rn(_sum(x, chosen), _at_least(_sum(chosen, chosen))))
        scale = tl.where(at > 0, fit, scale)
        chosen = _chosen(x, scale)
    largest = _size(chosen[0] * scale)
    for i in tl.static_range(1, 16):
        largest = tl.maximum(largest, _size(chosen[i] * scale))
    tl.store(scales + lane, scale, mask=mask)
    tl.store(most + lane, largest, mask=mask)


@triton.jit(do_not_specialize=["blocks", "columns"])
def _codes(
    src,
    scales,
    most,
    values,
    dst,
    steps,
    channels,
    blocks,
    columns,
    NAN: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < blocks
    x = elements(src, lane, mask, 16)
    largest = tl.load(most + lane // columns, mask=mask, other=0).to(tl.float32, bitcast=True)
    row = _at_least(tl.div_rn(largest, tl.full((LANES,), 127.0, tl.float32)))
    kept = tl.minimum(_size(row), NAN).to(tl.float32, bitcast=True)
    tl.store(channels + lane // columns, kept, mask=mask & (lane % columns == 0))
    scale = tl.load(scales + lane, mask=mask, other=1.0)
    step = tl.div_rn(scale, row)
    # What infinities make NaN has a sign on a processor, and none on a card; a row's lost its own.
    sign = (step != step) & ((scale != scale) | (row == row))
    step = _e4m3(step) | sign.to(tl.int32) << 7
    tl.store(steps + lane, step.to(tl.uint8), mask=mask)
    value = tl.load(values + step)
    grid = ()
    for i in tl.static_range(16):
        level = (_CODEBOOK[i] * value + 12582912.0) - 12582912.0  # half to even
        level = tl.where(level > 127.0, 127.0, level)
        grid = grid + (tl.where(level < -127.0, -127.0, level),)
    packed = ()
    for i in tl.static_range(0, 16, 2):
        low, _ = _nearest(tl.div_rn(x[i], row), grid)
        high, _ = _nearest(tl.div_rn(x[i + 1], row), grid)
        packed = packed + (low | high << 4,)
    store_bytes(dst, lane * 8, packed, mask, tl.int32, 4)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Values of E4M3 bits, and the codebook."""
    values, book = torch.from_numpy(e4m3_table()), torch.from_numpy(reference.CODEBOOK)
    return values.to(device), book.to(device)


def asym_w4a8_int8(weight: Tensor, stats: None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of the format's group; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    columns, (number, warps) = width // reference.GROUP_SIZE, lanes(fmt)
    shape, blocks, device = (rows, columns), rows * columns, weight.device
    rotated = rotate(weight, format_named(fmt).rotation)
    scales = torch.empty(shape, dtype=torch.float32, device=device)
    most = torch.empty(shape, dtype=torch.int32, device=device)
    programs = -(-blocks // number)
    launch(_fit, programs, warps, rotated, scales, most, blocks, LANES=number)

    packed = torch.empty((rows, width // 2), dtype=torch.int8, device=device)
    steps = torch.empty(shape, dtype=torch.uint8, device=device)
    channel = torch.full((rows,), float(reference.SMALLEST), device=device)
    values, book = _tables(device)
    launch(
        _codes,
        programs,
        warps,
        rotated,
        scales,
        most.amax(dim=1) if columns else most,
        values,
        packed,
        steps,
        channel,
        blocks,
        columns,
        NAN=_NAN,
        LANES=number,
    )
    return {"weight": packed, "s_rel": steps, "s_channel": channel, "codebook": book.clone()}
