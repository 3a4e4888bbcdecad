"""Products of few rows (1 to 64) with a packed weight: no decoded weight is ever in memory.

A program takes N rows of the weight and a share of K. Step by step it decodes a tile with the
function that the format's own decoder uses, rounds it to the compute dtype, as a decoded weight
would be, and multiplies it; sums are float32's. What is read is the packed weight, once. For more
rows decoding once pays: see gemm.py and the decoders.

    _one_row   a thread multiplies what it decoded, in its registers; threads are summed once, at
               the end
    _few       by tensor cores, with the weight as the left operand: its rows are spread over the
               warps. The other way round every warp decoded all of a tile, two to four times the
               work. Several rows of activations, and one where TILES says so

Few rows of a weight are few programs, so K is shared out as well. Partial sums then go to memory,
and a second kernel adds them: results do not depend on which came first.

    blocks   ggml's formats in KERNELS of blocks_32 and blocks_k (rows of whole blocks)
    scaled   fp8 and int8 with a scale for the tensor or per row
    flat     nf4 and fp4, where rows are whole blocks of 64

A tile function returns planes, as blocks.py calls them, of N rows and UNITS units, row after row:
each (N * UNITS, WIDTH) float32. They are not put together: each meets its own activations.
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
from diffquant.runtime.kernels.triton.bits import at, e4m3, e5m2, int8
from diffquant.runtime.kernels.triton.blocks import Table, unit_start
from diffquant.runtime.kernels.triton.few_tiles import FewTile, most_rows, tile_for, usable
from diffquant.runtime.kernels.triton.launch import aligned, launch
from diffquant.runtime.kernels.triton.tables import table

__all__ = ["FORMATS_SERVED", "family", "few_rows", "most_rows", "serves"]

_LEAST_ROWS = 16  # of a tensor core's tile
_UNIT = 32  # weights that are read together where a format has no blocks
_SUMS = 256  # of a program that adds partial sums


@triton.jit
def _block_tile(src, scale, table, row, unit, mask, per_row, DECODE: tl.constexpr,
                WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    # Blocks of an even number of bytes are aligned for 16-bit loads in every row; mxfp4's 17 are
    # read by bytes.
    blocks = per_row // PER_BLOCK
    block = row.to(tl.int64) * (blocks * NBYTES) + unit // PER_BLOCK * NBYTES
    return DECODE(src, block, unit % PER_BLOCK, mask, table, 0)  # by words


@triton.jit
def _scaled_tile(src, scale, table, row, unit, mask, per_row, DECODE: tl.constexpr,
                 WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr,
                 GROUP: tl.constexpr):  # fmt: skip
    column = tl.arange(0, WIDTH)
    inside = mask[:, None] & ((unit * WIDTH)[:, None] + column[None, :] < per_row)
    place = at(row.to(tl.int64) * per_row + unit * WIDTH, column, GROUP)
    code = tl.load(src + place, mask=inside, other=0).to(tl.int32)
    factor = tl.load(scale + row * NBYTES, mask=mask, other=0).to(tl.float32)  # NBYTES: 0 or 1
    return (DECODE(code) * factor[:, None],)


@triton.jit
def _flat_tile(src, scale, table, row, unit, mask, per_row, DECODE: tl.constexpr,
               WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr,
               GROUP: tl.constexpr):  # fmt: skip
    block = row.to(tl.int64) * per_row + unit
    place = at(block * WIDTH, tl.arange(0, WIDTH), GROUP)
    packed = tl.load(src + place, mask=mask[:, None], other=0).to(tl.int32)
    factor = tl.load(scale + block, mask=mask, other=0)[:, None]
    return tl.load(table + (packed >> 4)) * factor, tl.load(table + (packed & 15)) * factor


@triton.jit
def _activations(x, unit, depth, mask, WIDTH: tl.constexpr, PLANES: tl.constexpr,
                 STRIDE: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """What planes of units of a row meet: PLANES of (units, WIDTH)."""
    if STRIDE == 0:  # planes take turns
        # Read apart: pairs that are split afterwards gave wrong numbers, compiled by Triton 3.6.
        place = (unit * (2 * WIDTH))[:, None] + 2 * tl.arange(0, WIDTH)[None, :]
        first = tl.load(x + place, mask=mask[:, None], other=0.0)
        return first, tl.load(x + place + 1, mask=mask[:, None], other=0.0)
    planes = ()
    start = unit_start(unit, WIDTH, PLANES, STRIDE)
    for i in tl.static_range(PLANES):
        place = at(start + i * STRIDE, tl.arange(0, WIDTH), GROUP)
        planes += (tl.load(x + place, mask=mask[:, None] & (place < depth), other=0.0),)
    return planes


@triton.jit(do_not_specialize=["rows", "units", "share"])
def _one_row(x, src, scale, table, bias, dst, rows, columns, depth, per_row, units, share,
             TILE: tl.constexpr, DECODE: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr,
             STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr,
             GROUP: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
             UNITS: tl.constexpr):  # fmt: skip
    run = tl.arange(0, N * UNITS)
    tiles = tl.cdiv(columns, N)
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    row = tile * N + run // UNITS  # of the weight
    first = part * share
    last = tl.minimum(first + share, units)
    kind = x.dtype.element_ty
    total = tl.zeros((N * UNITS, WIDTH), tl.float32)
    for start in range(first, last, UNITS):
        unit = start + run % UNITS
        mask = (row < columns) & (unit < last)
        weight = TILE(src, scale, table, row, unit, mask, per_row, DECODE, WIDTH, PER_BLOCK,
                      NBYTES, GROUP)  # fmt: skip
        one = start + tl.arange(0, UNITS)
        given = _activations(x, one, depth, one < last, WIDTH, PLANES, STRIDE, GROUP)
        for i in tl.static_range(PLANES):
            same = tl.broadcast_to(given[i].to(tl.float32)[None, :, :], (N, UNITS, WIDTH))
            same = tl.reshape(same, (N * UNITS, WIDTH))
            total = tl.fma(weight[i].to(kind).to(tl.float32), same, total)
    found = tl.sum(tl.reshape(total, (N, UNITS * WIDTH)), 1)
    row = tile * N + tl.arange(0, N)
    if BIAS:
        found += tl.load(bias + row, mask=row < columns, other=0.0).to(tl.float32)
    dst += part * columns
    tl.store(dst + row, found.to(dst.dtype.element_ty), mask=row < columns)


@triton.jit(do_not_specialize=["rows", "units", "share"])
def _few(x, src, scale, table, bias, dst, rows, columns, depth, per_row, units, share,
         TILE: tl.constexpr, DECODE: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr,
         STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, NBYTES: tl.constexpr,
         GROUP: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
         UNITS: tl.constexpr):  # fmt: skip
    run = tl.arange(0, N * UNITS)
    tiles = tl.cdiv(columns, N)
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    row = tile * N + run // UNITS  # of the weight
    first = part * share
    last = tl.minimum(first + share, units)
    token, column = tl.arange(0, M), tl.arange(0, UNITS * WIDTH)
    kind = x.dtype.element_ty
    total = tl.zeros((N, M), tl.float32)
    for start in range(first, last, UNITS):
        unit = start + run % UNITS
        mask = (row < columns) & (unit < last)
        weight = TILE(src, scale, table, row, unit, mask, per_row, DECODE, WIDTH, PER_BLOCK,
                      NBYTES, GROUP)  # fmt: skip
        if STRIDE == 0:  # planes take turns
            place = start * (2 * WIDTH) + tl.arange(0, 2 * UNITS * WIDTH)
            some = (token < rows)[:, None] & (place < last * (2 * WIDTH))[None, :]
            pairs = tl.load(x + token[:, None] * depth + place[None, :], mask=some, other=0.0)
            given = tl.split(tl.reshape(pairs, (M, UNITS * WIDTH, 2)))
        for i in tl.static_range(PLANES):
            if STRIDE == 0:
                right = given[i]
            else:
                one = start + column // WIDTH
                place = unit_start(one, WIDTH, PLANES, STRIDE) + i * STRIDE + column % WIDTH
                some = (token < rows)[:, None] & ((one < last) & (place < depth))[None, :]
                right = tl.load(x + token[:, None] * depth + place[None, :], mask=some, other=0.0)
            left = tl.reshape(weight[i].to(kind), (N, UNITS * WIDTH))
            total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    row = tile * N + tl.arange(0, N)
    if BIAS:
        total += tl.load(bias + row, mask=row < columns, other=0.0).to(tl.float32)[:, None]
    dst += part * (rows * columns)
    mask = (token < rows)[:, None] & (row < columns)[None, :]
    value = tl.trans(total.to(dst.dtype.element_ty))
    tl.store(dst + token[:, None] * columns + row[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["shares", "count"])
def _added(parts, bias, dst, shares, count, columns, BIAS: tl.constexpr, SHARES: tl.constexpr,
           SIZE: tl.constexpr):  # fmt: skip
    """Sums over (shares, count), all read at once and added in an order of their own."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask, share = place < count, tl.arange(0, SHARES)
    every = parts + share[:, None] * count + place[None, :]
    part = tl.load(every, mask=(share < shares)[:, None] & mask[None, :], other=0.0)
    total = tl.sum(part, 0)
    if BIAS:
        total += tl.load(bias + place % columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(dst + place, total.to(dst.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class _Few:
    """How a format's tile is decoded: a function of tiles, and what it is told; see blocks.py.

    Attributes:
        stride: weights from a plane of a unit to the next; 0: two planes take turns.
    """

    tile: Any
    decode: Any = None
    scale: str = "weight"
    width: int = _UNIT
    planes: int = 1
    stride: int = _UNIT
    per_block: int = 1
    nbytes: int = 1
    table: Table | None = None


def _of_blocks() -> Mapping[str, _Few]:
    found = {}
    for name, one in {**blocks_32.KERNELS, **blocks_k.KERNELS}.items():
        told = {key.lower(): value for key, value in one.constants.items()}
        found[name] = _Few(_block_tile, table=one.table, **told)
    return found


def _flat(name: str) -> _Few:
    width = BLOCK_SIZE // 2
    return _Few(_flat_tile, scale="absmax", width=width, planes=2, stride=0, table=table(name))


_ROWS: Mapping[str, _Few] = {
    **_of_blocks(),
    "fp8_e4m3_scaled": _Few(_scaled_tile, e4m3, scale="scale"),
    "fp8_e4m3_rowwise": _Few(_scaled_tile, e4m3, scale="scale"),
    "fp8_e5m2_scaled": _Few(_scaled_tile, e5m2, scale="scale"),
    "int8_tensor": _Few(_scaled_tile, int8, scale="scale"),
    "int8_rowwise": _Few(_scaled_tile, int8, scale="scale"),
    "nf4": _flat("nf4"),
    "fp4": _flat("fp4"),
}
FORMATS_SERVED = frozenset(_ROWS)


def family(fmt: str) -> str:
    """What formats that take the same tiles have in common: how a byte holds their weights."""
    one = _ROWS[fmt]
    named = {_scaled_tile: "scaled", _flat_tile: "flat"}
    return named.get(one.tile, f"{one.planes}x{one.width}")


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
    x: Tensor,
    fmt: str,
    parts: Parts,
    shape: tuple[int, int],
    bias: Tensor | None,
    *,
    tile: FewTile | None = None,
) -> Tensor:
    """Multiply up to `most_rows` rows with a packed weight that `serves` accepts.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        fmt: number format.
        parts: its stored tensors, on the device of `x`.
        shape: (N, K) of the weight.
        bias: (N,) or None.
        tile: None: few_tiles.TILES'.

    Returns:
        (M, N) in the dtype of `x`: decoded weight rounded to that dtype, float32 sums.
    """
    one, (columns, depth), rows = _ROWS[fmt], shape, len(x)
    tile = tile_for(family(fmt), rows, x.dtype.itemsize) if tile is None else tile
    assert rows
    assert usable(family(fmt), tile, rows, x.dtype.itemsize)
    weight, x = aligned(parts["weight"]).view(torch.uint8), aligned(x)
    scale = aligned(parts[one.scale])
    per_unit = one.width * one.planes
    units, step = -(-depth // per_unit), max(1, tile.k // per_unit)
    per_row, nbytes = units, one.nbytes
    if one.tile is _scaled_tile:
        per_row, nbytes = depth, int(scale.numel() > 1)
    tiles = -(-columns // tile.n)
    share = tile.share(tiles, units, step)
    shares = -(-units // share)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    into = out if shares == 1 else x.new_empty((shares, rows, columns), dtype=torch.float32)
    added = x if bias is None else bias.contiguous()
    launch(
        _few if rows > 1 else _one_row,
        tiles * shares,
        tile.warps,
        x,
        weight,
        scale,
        one.table(weight.device) if one.table else weight,
        added,
        into,
        rows,
        columns,
        depth,
        per_row,
        units,
        share,
        TILE=one.tile,
        DECODE=one.decode,
        WIDTH=one.width,
        PLANES=one.planes,
        STRIDE=one.stride,
        PER_BLOCK=one.per_block,
        NBYTES=nbytes,
        GROUP=tile.group,
        BIAS=bias is not None and shares == 1,
        M=max(_LEAST_ROWS, triton.next_power_of_2(rows)),
        N=tile.n,
        UNITS=step,
        num_stages=tile.stages,
    )
    if shares > 1:
        count = rows * columns
        launch(
            _added,
            -(-count // _SUMS),
            4,
            into,
            added,
            out,
            shares,
            count,
            columns,
            BIAS=bias is not None,
            SHARES=triton.next_power_of_2(shares),
            SIZE=_SUMS,
        )
    return out
