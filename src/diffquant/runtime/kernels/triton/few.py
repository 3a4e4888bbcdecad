"""Products of few rows (1 to 64) with a packed weight: no decoded weight is ever in memory.

A program takes N rows of the weight and a share of their columns. Step by step it decodes a tile
with the function that the format's own decoder uses and rounds it to the compute dtype, as a
decoded weight would be. What is read is the packed weight, once. For more rows decoding once pays:
see gemm.py and the decoders.

    lanes    1 or 2 rows: each number times its activation, summed in float32 where it was decoded;
             nothing goes through shared memory before the end
    cores    more rows: tiles go to tensor cores, sums are float32's

Weights with few rows leave most of a card idle, so columns are shared out to as many programs as
fill it; their sums are added up in a fixed order by a second kernel: results repeat bit for bit.

    blocks   ggml's formats in KERNELS of blocks_32 and blocks_k (rows of whole blocks)
    scaled   fp8 and int8 with a scale for the tensor or per row
    flat     nf4 and fp4, where rows are whole blocks of 64
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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

__all__ = [
    "CANDIDATES", "FORMATS_SERVED", "MOST_ROWS", "FewTile", "few_rows", "most_rows", "serves",
    "tile_for",
]  # fmt: skip

MOST_ROWS = 64
_LEAST_ROWS = 16  # of a tensor core's tile
_LANES = 2  # rows up to which numbers are multiplied where they were decoded
_PROGRAMS = 8  # per multiprocessor: so many fill a card
_LARGE = 200 << 10  # bytes of shared memory
_SUMMED = 1024  # results of a program that adds up


class FewTile(NamedTuple):
    """Rows of the weight of a program, columns of a step, warps, programs per multiprocessor."""

    n: int
    k: int
    warps: int
    programs: int = _PROGRAMS


CANDIDATES = tuple(
    FewTile(n, k, warps, programs)
    for n, k, warps in ((16, 256, 4), (8, 512, 4), (32, 256, 8), (16, 256, 2), (4, 1024, 4))
    for programs in (4, 16)
)


# One H100, median of both shapes of gpu_matmul.py --parts tiles, over a bfloat16 GEMM with as many
# rows. One row: 0.6 to 1.05, q6_k 2.0. 64 rows: 1.3 to 1.7; formats that are slower there than
# decoding and multiplying apart (1.8 to 2.1) are served for one or two rows only.
_LANE_TILES = {
    "q4_k": FewTile(4, 1024, 4, 4),
    "q5_k": FewTile(4, 1024, 4, 4),
    "q6_k": FewTile(16, 256, 4, 4),
    "fp8_e4m3_scaled": FewTile(16, 256, 4, 4),
    "fp8_e4m3_rowwise": FewTile(16, 256, 4, 4),
    "int8_tensor": FewTile(4, 1024, 4, 4),
    "int8_rowwise": FewTile(4, 1024, 4, 4),
    "nf4": FewTile(16, 256, 2, 16),
    "fp4": FewTile(16, 256, 2, 16),
}
_CORE_TILES = {
    "q8_0": FewTile(32, 256, 8, 16),
    "q4_0": FewTile(32, 256, 8, 16),
    "q4_k": FewTile(16, 256, 4, 16),
    "fp8_e4m3_scaled": FewTile(16, 256, 4, 16),
    "fp8_e4m3_rowwise": FewTile(16, 256, 4, 16),
    "int8_tensor": FewTile(16, 256, 4, 4),
    "int8_rowwise": FewTile(16, 256, 4, 4),
}


def tile_for(fmt: str, rows: int, nbytes: int, *, large: bool = False) -> FewTile:
    """The tile for a format and so many rows of activations of `nbytes` per number.

    `large`: whether a program may have Hopper's shared memory; else it fits into 99 KB.
    """
    if rows <= _LANES:
        return _LANE_TILES.get(fmt, FewTile(8, 512, 4, 4))
    found = _CORE_TILES.get(fmt, FewTile(16, 256, 4))
    deep = large or (rows <= _LEAST_ROWS and nbytes == 2)
    return found if deep and nbytes == 2 else found._replace(k=128)


def most_rows(fmt: str) -> int:
    """Rows up to which a format is faster so than decoded first."""
    return MOST_ROWS if fmt in _CORE_TILES else _LANES


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
    # A run is WIDTH weights of one scale, WIDTH / 2 bytes, high nibble first.
    run = tl.arange(0, N * K // WIDTH)
    place = start // WIDTH + run % (K // WIDTH)
    down = tl.reshape(tl.broadcast_to(row[:, None], (N, K // WIDTH)), (N * K // WIDTH,))
    live = tl.reshape(tl.broadcast_to(some[:, None], (N, K // WIDTH)), (N * K // WIDTH,))
    live = live & (place * WIDTH < columns)
    block = down.to(tl.int64) * (columns // WIDTH) + place
    inside = block[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
    packed = tl.load(src + inside, mask=live[:, None], other=0).to(tl.int32)
    factor = tl.load(scale + block, mask=live, other=0)[:, None]
    high = tl.load(table + (packed >> 4)) * factor
    low = tl.load(table + (packed & 15)) * factor
    return tl.reshape(tl.join(high, low), (N, K))


@triton.jit
def _finish(
    total, bias, dst, partial, split, splits, rows, columns, row, token, BIAS: tl.constexpr
):
    """Write (M, N) sums: with the bias, or what one of several programs has of them."""
    mask = (token < rows)[:, None] & (row < columns)[None, :]
    place = token[:, None] * columns + row[None, :]
    if splits == 1:
        if BIAS:
            total += tl.load(bias + row, mask=row < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(dst + place, total.to(dst.dtype.element_ty), mask=mask)
    else:
        tl.store(partial + split * rows * columns + place, total, mask=mask)


@triton.jit
def _cores(x, src, scale, table, bias, dst, partial, tiles, splits, share, rows, columns, depth,
           per_row, TILE: tl.constexpr, DECODE: tl.constexpr, WIDTH: tl.constexpr,
           PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr,
           N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    split = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * N + tl.arange(0, N)  # of the weight
    some = row < columns
    token, step = tl.arange(0, M), tl.arange(0, K)
    kind = x.dtype.element_ty
    total = tl.zeros((M, N), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, depth), K):
        weight = TILE(src, scale, table, row, some, start, depth, per_row, DECODE, WIDTH,
                      PER_BLOCK, NBYTES, N, K)  # fmt: skip
        mask = (token < rows)[:, None] & (start + step < depth)[None, :]
        left = tl.load(x + token[:, None] * depth + start + step[None, :], mask=mask, other=0.0)
        total = tl.dot(left, tl.trans(weight.to(kind)), total, input_precision="ieee")
    _finish(total, bias, dst, partial, split, splits, rows, columns, row, token, BIAS)


@triton.jit
def _lanes(x, src, scale, table, bias, dst, partial, tiles, splits, share, rows, columns, depth,
           per_row, TILE: tl.constexpr, DECODE: tl.constexpr, WIDTH: tl.constexpr,
           PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr,
           N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    split = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * N + tl.arange(0, N)  # of the weight
    some = row < columns
    step = tl.arange(0, K)
    kind = x.dtype.element_ty
    first = tl.zeros((N, K), tl.float32)
    second = first
    for start in range(split * share, tl.minimum(split * share + share, depth), K):
        weight = TILE(src, scale, table, row, some, start, depth, per_row, DECODE, WIDTH,
                      PER_BLOCK, NBYTES, N, K)  # fmt: skip
        weight = weight.to(kind).to(tl.float32)
        inside = start + step < depth
        left = tl.load(x + start + step, mask=inside, other=0.0).to(tl.float32)
        first += weight * left[None, :]
        if M == 2:
            left = tl.load(x + depth + start + step, mask=inside, other=0.0).to(tl.float32)
            second += weight * left[None, :]
    token = tl.arange(0, 1)
    total = tl.sum(first, axis=1)[None, :]
    _finish(total, bias, dst, partial, split, splits, rows, columns, row, token, BIAS)
    if M == 2:
        total = tl.sum(second, axis=1)[None, :]
        _finish(total, bias, dst, partial, split, splits, rows, columns, row, token + 1, BIAS)


@triton.jit
def _together(partial, bias, dst, splits, count, columns, BIAS: tl.constexpr, SIZE: tl.constexpr):
    """Add up what programs have of a result, in their order."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < count
    total = tl.zeros((SIZE,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + split * count + at, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias + at % columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(dst + at, total.to(dst.dtype.element_ty), mask=mask)


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


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _is_large(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    found = torch.cuda.get_device_properties(device)
    return bool(getattr(found, "shared_memory_per_block_optin", 0) >= _LARGE)


def few_rows(
    x: Tensor,
    fmt: str,
    parts: Parts,
    shape: tuple[int, int],
    bias: Tensor | None,
    *,
    tile: FewTile | None = None,
) -> Tensor:
    """Multiply up to MOST_ROWS rows with a packed weight that `serves` accepts.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        fmt: number format.
        parts: its stored tensors, on the device of `x`.
        shape: (N, K) of the weight.
        bias: (N,) or None.
        tile: instead of `tile_for`'s.

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
    lanes = rows <= _LANES
    size = tile or tile_for(fmt, rows, x.dtype.itemsize, large=_is_large(x.device))
    tiles, steps = triton.cdiv(columns, size.n), triton.cdiv(depth, size.k)
    wanted = triton.cdiv(size.programs * _processors(x.device), tiles)
    each = triton.cdiv(steps, max(1, min(wanted, steps)))  # steps of a program
    splits = triton.cdiv(steps, each)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    partial = out
    if splits > 1:
        partial = torch.empty((splits, rows, columns), dtype=torch.float32, device=x.device)
    added = weight if bias is None else bias.contiguous()
    launch(
        _lanes if lanes else _cores,
        tiles * splits,
        size.warps,
        x,
        weight,
        scale,
        one.table(weight.device) if one.table else weight,
        added,
        out,
        partial,
        tiles,
        splits,
        each * size.k,
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
        M=rows if lanes else max(_LEAST_ROWS, triton.next_power_of_2(rows)),
        N=size.n,
        K=size.k,
    )
    if splits > 1:
        count = rows * columns
        launch(
            _together,
            triton.cdiv(count, _SUMMED),
            4,
            partial,
            added,
            out,
            splits,
            count,
            columns,
            BIAS=bias is not None,
            SIZE=_SUMMED,
        )
    return out
