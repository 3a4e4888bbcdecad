"""8-bit numbers with a float32 scale: one for the tensor, per row, or per block of 128 by 128.

fp8_e4m3_scaled, fp8_e5m2_scaled, int8_tensor, fp8_e4m3_rowwise, int8_rowwise, int8_bnb, and the two
blockwise formats. The weight is a matrix; a program takes a tile of it that lies in one block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.int8_bnb import ONE_LEVEL
from diffquant.quant.layout import matrix_shape
from diffquant.runtime.kernels.fields import Kernel, Parts
from diffquant.runtime.kernels.reference import KERNELS as REFERENCE
from diffquant.runtime.kernels.triton.bits import at, e4m3, e5m2, int8
from diffquant.runtime.kernels.triton.launch import aligned, group, launch, tile

__all__ = ["KERNELS"]

_BLOCK = 128
# Columns of a tile: the widest that leaves least of the last tile empty.
_WIDTHS = (1024, 512, 256, 128)


@triton.jit
def _scaled(
    src,
    scale,
    dst,
    rows,
    columns,
    stride_r,
    stride_c,
    VALUE: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    across = (columns + COLUMNS - 1) // COLUMNS
    down = tl.program_id(0) // across
    first_r = down.to(tl.int64) * ROWS
    first_c = (tl.program_id(0) - down * across).to(tl.int64) * COLUMNS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    some = row < rows - first_r
    mask = some[:, None] & (column < columns - first_c)[None, :]
    start = first_r * columns + first_c
    place = at(row * columns, column, GROUP)
    value = VALUE(tl.load(src + start + place, mask=mask, other=0).to(tl.int32))
    block = (first_r + row) // BLOCK_R * stride_r + first_c // BLOCK_C * stride_c
    value = value * tl.load(scale + block, mask=some, other=0).to(tl.float32)[:, None]
    if FACTOR != 0.0:
        value = value * FACTOR
    tl.store(dst + start + place, value.to(dst.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A row of the table: how a byte is read, where its scale is, what is multiplied after it."""

    value: Any
    part: str = "scale"
    factor: float = 0.0  # 0: none
    blockwise: bool = False


_INT8_BNB = _Scaled(int8, part="scb", factor=float(ONE_LEVEL))
_ROWS: Mapping[str, _Scaled] = {
    "fp8_e4m3_scaled": _Scaled(e4m3),
    "fp8_e4m3_rowwise": _Scaled(e4m3),
    "fp8_e4m3_blockwise": _Scaled(e4m3, part="block_scale", blockwise=True),
    "fp8_e5m2_scaled": _Scaled(e5m2),
    "int8_tensor": _Scaled(int8),
    "int8_rowwise": _Scaled(int8),
    "int8_bnb": _INT8_BNB,
    "int8_blockwise": _Scaled(int8, part="block_scale", blockwise=True),
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _strides(row: _Scaled, scale: Tensor, rows: int, columns: int) -> tuple[int, int] | None:
    """Steps from one row of scales and one column of them to the next; None: laid out otherwise."""
    if row.blockwise:
        whole = columns % _BLOCK == 0 and scale.shape == (-(-rows // _BLOCK), columns // _BLOCK)
        return (columns // _BLOCK, 1) if whole else None
    if scale.numel() == 1:
        return 0, 0
    return (1, 0) if scale.numel() == rows else None


def _decode(name: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    row, (rows, columns) = _ROWS[name], matrix_shape(shape)
    stored, scale = parts["weight"], parts[row.part]
    strides = _strides(row, scale, rows, columns)
    if strides is None or stored.numel() != math.prod(shape) or scale.dtype not in _FLOATS:
        return REFERENCE[name](parts, shape, dtype)
    if strides == (0, 0):
        rows, columns = 1, rows * columns
    weight = aligned(stored).view(torch.uint8)
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    width = _BLOCK if row.blockwise else min(_WIDTHS, key=lambda wide: -(-columns // wide) * wide)
    weights, warps = tile(name)
    height = max(1, weights // width)
    launch(
        _scaled,
        -(-rows // height) * -(-columns // width),
        warps,
        weight,
        aligned(scale),
        out,
        rows,
        columns,
        *strides,
        VALUE=row.value,
        FACTOR=row.factor,
        BLOCK_R=_BLOCK if row.blockwise else 1,
        BLOCK_C=_BLOCK,
        ROWS=height,
        COLUMNS=width,
        GROUP=group(dtype),
    )
    return out


KERNELS: Mapping[str, Kernel] = {name: functools.partial(_decode, name) for name in _ROWS}
