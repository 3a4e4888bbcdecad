"""Rows of activations in 8 bits, with a scale per row: one kernel reads them once; see rows.py.

A program takes one row. Up to _WIDEST columns are held in registers; longer rows are read twice,
the second time from the card's cache. Rotated rows take groups as their tile's rows, turned as in
triton/rotated.py; they have to fit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.triton.int8_convrot import rotation_step
from diffquant.runtime.kernels.rows import KINDS, LEAST_SCALE
from diffquant.runtime.kernels.rows import quantize_rows as reference
from diffquant.runtime.kernels.triton.bits import to_e4m3
from diffquant.runtime.kernels.triton.launch import aligned, launch
from diffquant.runtime.kernels.triton.rotated import rounded

__all__ = ["quantize_rows"]

_WIDEST = 16384


@triton.jit
def _scale(amax, TOP: tl.constexpr, LEAST: tl.constexpr):
    return tl.maximum(tl.div_rn(amax, TOP), LEAST)


@triton.jit
def _codes(x, scale, TOP: tl.constexpr, INT: tl.constexpr):
    """What is stored: int8, or the bits of a float8 e4m3."""
    q = tl.div_rn(x, scale)
    q = tl.where(q > TOP, TOP, tl.where(q < -TOP, -TOP, q))  # NaN stays
    if INT:  # noqa: SIM108 - one branch is compiled
        codes = rounded(tl.where(q == q, q, 0.0)).to(tl.int8)
    else:
        codes = to_e4m3(q)
    return codes


@triton.jit
def _kept(amax, scale):
    """The scale of a row; NaN if something in it is not finite (an infinite amax, or NaN)."""
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def _magnitude(x):
    """Absolute values, NaN as infinity: `tl.max` may pass over NaN."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _rows(
    src,
    dst,
    scales,
    columns,
    stride,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    INT: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    src += row * stride
    dst += row * columns
    column = tl.arange(0, BLOCK)
    if WHOLE:
        mask = column < columns
        x = tl.load(src + column, mask=mask, other=0).to(tl.float32)
        amax = tl.max(_magnitude(x), axis=0)
        scale = _scale(amax, TOP, LEAST)
        tl.store(dst + column, _codes(x, scale, TOP, INT), mask=mask)
    else:
        most = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            mask = column < columns - start
            x = tl.load(src + start + column, mask=mask, other=0).to(tl.float32)
            most = tl.maximum(most, _magnitude(x))
        amax = tl.max(most, axis=0)
        scale = _scale(amax, TOP, LEAST)
        for start in range(0, columns, BLOCK):
            mask = column < columns - start
            x = tl.load(src + start + column, mask=mask, other=0).to(tl.float32)
            tl.store(dst + start + column, _codes(x, scale, TOP, INT), mask=mask)
    tl.store(scales + row, _kept(amax, scale))


@triton.jit
def _rotated_rows(
    src,
    dst,
    scales,
    columns,
    stride,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    INT: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, GROUPS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = column < columns
    x = tl.load(src + row * stride + column, mask=mask, other=0).to(tl.float32)
    for _ in tl.static_range((SIZE > 4) + (SIZE > 16) + (SIZE > 64)):
        x = rotation_step(x, GROUPS, SIZE)
    x = rotation_step(x, GROUPS, SIZE)
    amax = tl.max(tl.max(_magnitude(x), axis=1), axis=0)
    scale = _scale(amax, TOP, LEAST)
    tl.store(dst + row * columns + column, _codes(x, scale, TOP, INT), mask=mask)
    tl.store(scales + row, _kept(amax, scale))


def quantize_rows(x: Tensor, kind: str, *, rotation: int = 0) -> tuple[Tensor, Tensor]:
    """See rows.quantize_rows; the same numbers."""
    row, (count, columns) = KINDS[kind], x.shape
    if rotation and (columns % rotation or columns > _WIDEST or rotation not in (4, 16, 64, 256)):
        return reference(x, kind, rotation=rotation)
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.data_ptr() % 16 or x.stride(0) % 8:
        x = aligned(x)
    q = torch.empty((count, columns), dtype=row.dtype, device=x.device)
    scale = torch.empty((count, 1), dtype=torch.float32, device=x.device)
    constants = {"TOP": row.top, "LEAST": LEAST_SCALE, "INT": row.dtype == torch.int8}
    block = min(triton.next_power_of_2(columns), _WIDEST)
    if rotation:
        constants |= {"GROUPS": max(1, block // rotation), "SIZE": rotation}
    else:
        constants |= {"BLOCK": block, "WHOLE": block >= columns}
    kernel = _rotated_rows if rotation else _rows
    warps = 8 if block > 4096 else 4
    stored = q if q.dtype == torch.int8 else q.view(torch.uint8)
    launch(kernel, count, warps, x, stored, scale, columns, x.stride(0), **constants)
    return q, scale
