"""Products of few rows (1 to 64) with a packed weight: no decoded weight is ever in memory.

A program takes N rows of the weight. Step by step along K it decodes a tile with the function that
the format's own decoder uses, rounds it to the compute dtype, as a decoded weight would be, and
multiplies it on tensor cores with the rows of activations; sums are float32's. What is read is the
packed weight, once. For more rows decoding once pays: see gemm.py and the decoders.

    blocks   ggml's formats in KERNELS of blocks_32 and blocks_k (rows of whole blocks)
    scaled   fp8 and int8 with a scale for the tensor or per row
    flat     nf4 and fp4, where rows are whole blocks of 64
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.flat_blocks import BLOCK_SIZE
from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels.fields import Parts
from diffquant.runtime.kernels.triton import blocks_32, blocks_k
from diffquant.runtime.kernels.triton.bits import e4m3, e5m2, int8
from diffquant.runtime.kernels.triton.blocks import Table
from diffquant.runtime.kernels.triton.launch import aligned, launch
from diffquant.runtime.kernels.triton.tables import table

__all__ = ["FORMATS_SERVED", "MOST_ROWS", "few_rows", "serves"]

MOST_ROWS = 64
_LEAST_ROWS = 16  # of a tensor core's tile
_N, _WARPS = 16, 4  # rows of the weight of a program
_DEPTHS = {True: 256, False: 128}  # of a step, for up to 16 rows and more: tiles share 100 KB


@triton.jit
def _block_tile(src, scale, table, row, some, start, columns, per_row, DECODE: tl.constexpr,
                WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr,
                N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    # A run is WIDTH weights of one scale; those of a tile, row after row.
    run = tl.arange(0, N * K // WIDTH)
    place = start // WIDTH + run % (K // WIDTH)
    down = tl.reshape(tl.broadcast_to(row[:, None], (N, K // WIDTH)), (N * K // WIDTH,))
    live = tl.reshape(tl.broadcast_to(some[:, None], (N, K // WIDTH)), (N * K // WIDTH,))
    block = down.to(tl.int64) * per_row + place // PER_BLOCK * NBYTES
    mask = live & (place * WIDTH < columns)
    return tl.reshape(DECODE(src, block, place % PER_BLOCK, mask, table, 8), (N, K))


@triton.jit
def _scaled_tile(src, scale, table, row, some, start, columns, per_row, DECODE: tl.constexpr,
                 WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr,
                 N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    column = start + tl.arange(0, K)
    mask = some[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * per_row + column[None, :]
    code = tl.load(src + place, mask=mask, other=0).to(tl.int32)
    factor = tl.load(scale + row * WIDTH, mask=some, other=0).to(tl.float32)  # WIDTH: 0 or 1
    return DECODE(code) * factor[:, None]


@triton.jit
def _flat_tile(src, scale, table, row, some, start, columns, per_row, DECODE: tl.constexpr,
               WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr,
               N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    column = start // 2 + tl.arange(0, K // 2)
    mask = some[:, None] & (column < columns // 2)[None, :]
    place = row.to(tl.int64)[:, None] * per_row + column[None, :]
    packed = tl.load(src + place, mask=mask, other=0).to(tl.int32)
    factor = tl.load(scale + place // (WIDTH // 2), mask=mask, other=0)
    high = tl.load(table + (packed >> 4)) * factor
    low = tl.load(table + (packed & 15)) * factor
    return tl.reshape(tl.join(high, low), (N, K))


@triton.jit
def _few(x, src, scale, table, bias, dst, rows, columns, depth, per_row, TILE: tl.constexpr,
         DECODE: tl.constexpr, WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr,
         NBYTES: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
         K: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * N + tl.arange(0, N)  # of the weight
    some = row < columns
    token, step = tl.arange(0, M), tl.arange(0, K)
    kind = x.dtype.element_ty
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        weight = TILE(src, scale, table, row, some, start, depth, per_row, DECODE, WIDTH,
                      PER_BLOCK, NBYTES, N, K)  # fmt: skip
        mask = (token < rows)[:, None] & (start + step < depth)[None, :]
        left = tl.load(x + token[:, None] * depth + start + step[None, :], mask=mask, other=0.0)
        total = tl.dot(left, tl.trans(weight.to(kind)), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + row, mask=some, other=0.0).to(tl.float32)[None, :]
    mask = (token < rows)[:, None] & some[None, :]
    tl.store(dst + token[:, None] * columns + row[None, :], total.to(kind), mask=mask)


@dataclass(frozen=True, slots=True)
class _Few:
    """How a format's tile is decoded: a function of tiles, and what it is told."""

    tile: Any
    decode: Any = None
    scale: str = "weight"
    width: int = 1
    per_block: int = 1
    nbytes: int = 1
    table: Table | None = None


def _of_blocks() -> Mapping[str, _Few]:
    found = {}
    for name, one in {**blocks_32.KERNELS, **blocks_k.KERNELS}.items():
        row = FORMATS[name]
        found[name] = _Few(
            _block_tile,
            one.decode,
            width=one.width,
            per_block=row.block_size // one.width,
            nbytes=row.nbytes((1, row.block_size)),
            table=one.table,
        )
    return found


_ROWS: Mapping[str, _Few] = {
    **_of_blocks(),
    "fp8_e4m3_scaled": _Few(_scaled_tile, e4m3, scale="scale"),
    "fp8_e4m3_rowwise": _Few(_scaled_tile, e4m3, scale="scale"),
    "fp8_e5m2_scaled": _Few(_scaled_tile, e5m2, scale="scale"),
    "int8_tensor": _Few(_scaled_tile, int8, scale="scale"),
    "int8_rowwise": _Few(_scaled_tile, int8, scale="scale"),
    "nf4": _Few(_flat_tile, scale="absmax", width=BLOCK_SIZE, table=table("nf4")),
    "fp4": _Few(_flat_tile, scale="absmax", width=BLOCK_SIZE, table=table("fp4")),
}
FORMATS_SERVED = frozenset(_ROWS)


def serves(fmt: str, parts: Parts, shape: tuple[int, ...]) -> bool:
    """Whether a weight is laid out as the kernel reads it: FORMATS' own layout, rows apart."""
    if fmt not in _ROWS or len(shape) != 2:
        return False
    one, (columns, depth), stored = _ROWS[fmt], shape, parts["weight"]
    if one.tile is _scaled_tile:
        return stored.numel() == columns * depth and parts["scale"].numel() in (1, columns)
    if stored.dtype != torch.uint8:
        return False
    if one.tile is _flat_tile:
        whole = depth % BLOCK_SIZE == 0 and stored.numel() * 2 == columns * depth
        absmax = parts["absmax"]
        return (
            whole
            and absmax.dtype == torch.float32
            and absmax.numel() * BLOCK_SIZE == columns * depth
        )
    return stored.numel() == FORMATS[fmt].nbytes(shape)


def few_rows(
    x: Tensor, fmt: str, parts: Parts, shape: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """Multiply up to MOST_ROWS rows with a packed weight that `serves` accepts.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        fmt: number format.
        parts: its stored tensors, on the device of `x`.
        shape: (N, K) of the weight.
        bias: (N,) or None.

    Returns:
        (M, N) in the dtype of `x`: decoded weight rounded to that dtype, float32 sums.
    """
    one, (columns, depth), rows = _ROWS[fmt], shape, len(x)
    weight, x = aligned(parts["weight"]), aligned(x)
    if not FORMATS[fmt].block_size or one.tile is not _block_tile:
        weight = weight.view(torch.uint8)
    scale = aligned(parts[one.scale])
    width = one.width
    if one.tile is _scaled_tile:
        width = int(scale.numel() > 1)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    launch(
        _few,
        -(-columns // _N),
        _WARPS,
        x,
        weight,
        scale,
        one.table(weight.device) if one.table else weight,
        weight if bias is None else bias.contiguous(),
        out,
        rows,
        columns,
        depth,
        weight.numel() // columns,
        TILE=one.tile,
        DECODE=one.decode,
        WIDTH=width,
        PER_BLOCK=one.per_block,
        NBYTES=one.nbytes,
        BIAS=bias is not None,
        M=max(_LEAST_ROWS, triton.next_power_of_2(rows)),
        N=_N,
        K=_DEPTHS[rows <= _LEAST_ROWS and x.dtype.itemsize == 2],
    )
    return out
