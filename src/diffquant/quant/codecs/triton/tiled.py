"""Encoders of ComfyUI's mxfp8 and nvfp4; layouts as in codecs/mxfp8.py and nvfp4_comfy.py.

A program encodes 32 rows by 4 blocks, whose scales lie in one tile of codecs/swizzle.py. Programs
cover whole tiles; weights that are not there are zeros, and so are their bytes and scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs import mxfp8 as mxfp8_reference
from diffquant.quant.codecs import nvfp4_comfy as nvfp4_reference
from diffquant.quant.codecs.swizzle import TILE_COLUMNS, TILE_ROWS, rounded_up
from diffquant.quant.codecs.triton.launch import launch
from diffquant.quant.codecs.triton.scales import (
    ceil_log2,
    e4m3_code,
    e4m3_value,
    magnitude_bits,
)

__all__ = ["mxfp8", "nvfp4_comfy"]

_ROWS = 32  # of a program: a tile has four times as many
_WARPS = 4


@triton.jit
def _place(columns, SIZE: tl.constexpr):
    """Where a program's 128 blocks are: row and first column of each, place of its scale."""
    across = tl.cdiv(columns, 4 * SIZE)  # tiles
    program = tl.program_id(0)
    tile, part = program // 4, program % 4
    block = tl.arange(0, 128)
    line, side = block // 4, block % 4
    row = (tile // across * 4 + part) * 32 + line
    column = (tile % across * 4 + side) * SIZE
    return row, column, tile.to(tl.int64) * 512 + line * 16 + part * 4 + side


@triton.jit
def _loaded(src, row, column, rows, columns, SIZE: tl.constexpr):
    """Blocks (128, SIZE), 0 outside of the weight, and their largest magnitudes."""
    column = column[:, None] + tl.arange(0, SIZE)[None, :]
    mask = (row < rows)[:, None] & (column < columns)
    # 64 bits: weights beyond 2**31 bytes.
    x = tl.load(src + row.to(tl.int64)[:, None] * columns + column, mask=mask, other=0.0)
    x = x.to(tl.float32)
    return x, tl.max(magnitude_bits(x), axis=1).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "columns"])
def _mxfp8(src, packed, scales, rows, columns, SIZE: tl.constexpr):
    row, column, place = _place(columns, SIZE)
    x, most = _loaded(src, row, column, rows, columns, SIZE)
    needed = magnitude_bits(tl.div_rn(most, tl.full(most.shape, 448.0, tl.float32)))
    needed = tl.maximum(needed, 0x400000)  # 2**-127
    byte = tl.where(needed < 0x7F800000, ceil_log2(needed) + 127, 254)
    tl.store(scales + place, byte.to(tl.uint8))
    # 2**(127 - byte): the product is the quotient, bit for bit.
    inverse = tl.where(byte < 254, 254 - byte << 23, 0x400000).to(tl.float32, bitcast=True)
    size = tl.abs(x) * inverse[:, None]
    code = e4m3_code(tl.where(size > 448.0, 448.0, size))
    code |= x.to(tl.int32, bitcast=True) >> 24 & 0x80
    code = tl.where(byte[:, None] > 0, code, 0)
    wide = tl.cdiv(columns, SIZE) * SIZE
    column = column[:, None] + tl.arange(0, SIZE)[None, :]
    mask = (row < tl.cdiv(rows, SIZE) * SIZE)[:, None] & (column < wide)
    tl.store(packed + row.to(tl.int64)[:, None] * wide + column, code.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["rows", "columns"])
def _nvfp4(src, packed, scales, tensor_scale, rows, columns, SIZE: tl.constexpr):
    row, column, place = _place(columns, SIZE)
    x, most = _loaded(src, row, column, rows, columns, SIZE)
    whole = tl.broadcast_to(tl.load(tensor_scale), most.shape)
    wanted = tl.div_rn(tl.div_rn(most, tl.full(most.shape, 6.0, tl.float32)), whole)
    byte = e4m3_code(tl.where(wanted > 448.0, 448.0, wanted))
    tl.store(scales + place, byte.to(tl.uint8))
    scale = whole * e4m3_value(byte)
    safe = tl.where(scale == 0.0, 1.0, scale)
    size = tl.div_rn(tl.abs(x), tl.broadcast_to(safe[:, None], x.shape))
    # Magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6: a tie goes to the even code, NaN lies above all.
    level = 7 - (size <= 0.25).to(tl.int32) - (size < 0.75).to(tl.int32)
    level -= (size <= 1.25).to(tl.int32) + (size < 1.75).to(tl.int32)
    level -= (size <= 2.5).to(tl.int32) + (size < 3.5).to(tl.int32)
    level -= (size <= 5.0).to(tl.int32)
    code = level | x.to(tl.int32, bitcast=True) >> 28 & 8
    code = tl.where(scale[:, None] == 0.0, 0, code)
    high, low = tl.split(tl.reshape(code, (128, SIZE // 2, 2)))
    wide = tl.cdiv(columns, SIZE) * (SIZE // 2)
    column = column[:, None] // 2 + tl.arange(0, SIZE // 2)[None, :]
    mask = (row < tl.cdiv(rows, SIZE) * SIZE)[:, None] & (column < wide)
    byte = (high << 4 | low).to(tl.uint8)
    tl.store(packed + row.to(tl.int64)[:, None] * wide + column, byte, mask=mask)


def _room(weight: Tensor, size: int, per_byte: int) -> tuple[Tensor, Tensor, int]:
    """Codes and scales of a weight, not written yet, and the number of programs."""
    high, wide = (rounded_up(length, size) for length in weight.shape)
    tall, across = rounded_up(high, TILE_ROWS), rounded_up(wide // size, TILE_COLUMNS)
    packed = torch.empty((high, wide // per_byte), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((tall, across), dtype=torch.uint8, device=weight.device)
    return packed, scales, scales.numel() // (_ROWS * TILE_COLUMNS)


def mxfp8(weight: Tensor, stats: None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows, R a multiple of 128 unless they end the tensor; see quant/backends.py."""
    del stats, fmt
    packed, scales, programs = _room(weight, mxfp8_reference.BLOCK_SIZE, 1)
    launch(
        _mxfp8,
        programs,
        _WARPS,
        weight,
        packed,
        scales,
        *weight.shape,
        SIZE=mxfp8_reference.BLOCK_SIZE,
    )
    return {"weight": packed, "block_scale": scales}


def nvfp4_comfy(weight: Tensor, stats: float | None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows as `mxfp8` does; `stats` is the largest magnitude of the whole weight."""
    del fmt
    if stats is None:
        stats = float(weight.abs().max()) if weight.numel() else 0.0
    scale = float(nvfp4_reference.scale_of(stats))
    tensor_scale = torch.full((), scale, dtype=torch.float32, device=weight.device)
    packed, scales, programs = _room(weight, nvfp4_reference.BLOCK_SIZE, 2)
    launch(
        _nvfp4,
        programs,
        _WARPS,
        weight,
        packed,
        scales,
        tensor_scale,
        *weight.shape,
        SIZE=nvfp4_reference.BLOCK_SIZE,
    )
    return {"weight": packed, "block_scale": scales, "tensor_scale": tensor_scale}
