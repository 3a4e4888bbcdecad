"""Products of 8-bit rows on tensor cores: int8 sums in int32, fp8 sums in float32; see rows.py.

`(a b^T) * a_scale * b_scale + bias` in one kernel. Two ways of feeding the tensor cores:

    pointers     every program computes one tile of the result; loads of a tile by their addresses
    descriptors  as many programs as the card has multiprocessors walk over the tiles; tiles are
                 fetched by Hopper's copy engine (TMA), from capability 9.0 on

Tiles of the result are taken in groups of GROUP_M along the rows, so that what is read of `b` is
still in the card's cache when the next tile needs it. Which tile for which shape is TILES:
benchmarks/gpu_matmul.py --sweep tries others.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diffquant.runtime.kernels.triton.launch import aligned

__all__ = ["CANDIDATES", "TILES", "GemmTile", "multiply_rows", "tile_for"]


class GemmTile(NamedTuple):
    """Rows and columns of the result, depth of a step, stages in flight, warps, the way."""

    m: int = 128
    n: int = 256
    k: int = 128
    stages: int = 4
    warps: int = 8
    descriptors: bool = True


# (N, K) -> tile, where one is more than 1 % faster than the default; H100, int8, 4608 rows, by
# --sweep. Descriptors beat pointers there in all of 48 pairs, by 1 to 10 %.
TILES: dict[tuple[int, int], GemmTile] = {
    (3072, 3072): GemmTile(stages=3),
    (12288, 3072): GemmTile(256, 128, stages=3),
}
CANDIDATES = tuple(
    GemmTile(m, n, k, stages, warps, descriptors)
    for m, n, k, stages, warps in (
        (128, 256, 128, 3, 8),
        (128, 256, 128, 4, 8),
        (128, 256, 64, 4, 8),
        (128, 128, 128, 4, 8),
        (128, 128, 128, 4, 4),
        (256, 128, 128, 3, 8),
        (256, 128, 64, 4, 8),
        (64, 256, 128, 4, 4),
    )
    for descriptors in (False, True)
)
# For cards with less shared memory than Hopper's 227 KB: 72 KB.
_LEAN = GemmTile(128, 256, 64, stages=3)
_LEAST_SHARED = 99 << 10  # of the cards that are served: capability 8.6, 8.9, 12.0
_SPARE = 4 << 10  # barriers, and what is written through shared memory
_GROUP_M = 8
_TMA = 90  # capability from which there is a copy engine


def tile_for(rows: int, shape: tuple[int, int], shared: int = _LEAST_SHARED) -> GemmTile:
    """The tile for a product of `rows` rows with a weight of `shape`.

    Args:
        rows: of activations.
        shape: (N, K).
        shared: bytes of shared memory that a program may have.
    """
    found = TILES.get(shape, GemmTile())
    if rows <= 64:
        found = found._replace(m=64, n=128, stages=3, warps=4)
    fits = (found.m + found.n) * found.k * found.stages <= shared - _SPARE
    return found if fits else _LEAN._replace(m=min(found.m, _LEAN.m), warps=found.warps)


@triton.jit
def _place(tile, rows, columns, M: tl.constexpr, N: tl.constexpr, GROUP_M: tl.constexpr):
    """Which tile of the result: its row and its column, counted in tiles."""
    down, across = tl.cdiv(rows, M), tl.cdiv(columns, N)
    per_group = GROUP_M * across
    group = tile // per_group
    first = group * GROUP_M
    size = tl.minimum(down - first, GROUP_M)
    return first + tile % per_group % size, tile % per_group // size


@triton.jit
def _finish(
    total,
    a_scale,
    b_scale,
    bias,
    dst,
    row,
    column,
    rows,
    columns,
    BIAS: tl.constexpr,
    ONE: tl.constexpr,
):
    """Scale, add the bias, round once and write."""
    y = total.to(tl.float32) * tl.load(a_scale + row, mask=row < rows, other=0)[:, None]
    if ONE:
        y = y * tl.load(b_scale)
    else:
        y = y * tl.load(b_scale + column, mask=column < columns, other=0)[None, :]
    if BIAS:
        y += tl.load(bias + column, mask=column < columns, other=0).to(tl.float32)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(dst + offset, y.to(dst.dtype.element_ty), mask=mask)


@triton.jit
def _pointers(
    a,
    b,
    a_scale,
    b_scale,
    bias,
    dst,
    rows,
    columns,
    depth,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INT: tl.constexpr,
    BIAS: tl.constexpr,
    ONE: tl.constexpr,
):
    down, across = _place(tl.program_id(0), rows, columns, M, N, GROUP_M)
    row, column = down * M + tl.arange(0, M), across * N + tl.arange(0, N)
    step = tl.arange(0, K)
    # Rows and columns beyond the end read the first ones again; they are not written.
    a_at = a + (row % rows).to(tl.int64)[:, None] * depth + step[None, :]
    b_at = b + (column % columns).to(tl.int64)[None, :] * depth + step[:, None]
    total = tl.zeros((M, N), tl.int32 if INT else tl.float32)
    for start in range(0, depth, K):
        left = depth - start
        left_a = tl.load(a_at, mask=(step < left)[None, :], other=0 if INT else 0.0)
        left_b = tl.load(b_at, mask=(step < left)[:, None], other=0 if INT else 0.0)
        total = tl.dot(left_a, left_b, total, out_dtype=tl.int32 if INT else tl.float32)
        a_at += K
        b_at += K
    _finish(total, a_scale, b_scale, bias, dst, row, column, rows, columns, BIAS, ONE)


@triton.jit
def _descriptors(
    a,
    b,
    a_scale,
    b_scale,
    bias,
    dst,
    rows,
    columns,
    depth,
    programs,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INT: tl.constexpr,
    BIAS: tl.constexpr,
    ONE: tl.constexpr,
):
    tiles = tl.cdiv(rows, M) * tl.cdiv(columns, N)
    for tile in range(tl.program_id(0), tiles, programs):
        down, across = _place(tile, rows, columns, M, N, GROUP_M)
        total = tl.zeros((M, N), tl.int32 if INT else tl.float32)
        for start in range(0, depth, K):  # what lies beyond the end is zero
            left = a.load([down * M, start])
            right = b.load([across * N, start])
            total = tl.dot(left, right.T, total, out_dtype=tl.int32 if INT else tl.float32)
        row, column = down * M + tl.arange(0, M), across * N + tl.arange(0, N)
        _finish(total, a_scale, b_scale, bias, dst, row, column, rows, columns, BIAS, ONE)


@functools.cache
def _card(device: torch.device) -> tuple[int, int, int]:
    """Capability (90 for 9.0), multiprocessors, bytes of shared memory that a program may have."""
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", _LEAST_SHARED)
    return found.major * 10 + found.minor, found.multi_processor_count, shared


def multiply_rows(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    tile: GemmTile | None = None,
) -> Tensor:
    """See rows.multiply_rows: int8 the same numbers, fp8 to the order of float32 sums.

    `tile` is instead of `tile_for`'s. Descriptors need K to be a multiple of 16 and, on a card,
    capability 9.0: else tiles are loaded by their addresses, which gives the same numbers.
    """
    (rows, depth), columns = a.shape, b.shape[0]
    out = torch.empty((rows, columns), dtype=dtype, device=a.device)
    if not out.numel():
        return out
    capability, processors, shared = _card(a.device) if a.is_cuda else (_TMA, 4, _LEAST_SHARED)
    one = tile or tile_for(rows, (columns, depth), shared)
    a, b = aligned(a), aligned(b)
    tiles = triton.cdiv(rows, one.m) * triton.cdiv(columns, one.n)
    common = (
        a_scale.contiguous(),
        b_scale.contiguous(),
        out if bias is None else bias.contiguous(),
        out,
        rows,
        columns,
        depth,
    )
    constants = {
        "M": one.m,
        "N": one.n,
        "K": one.k,
        "GROUP_M": _GROUP_M,
        "INT": a.dtype == torch.int8,
        "BIAS": bias is not None,
        "ONE": b_scale.numel() == 1,
        "num_warps": one.warps,
        "num_stages": one.stages,
        "enable_fp_fusion": False,
    }
    here = torch.cuda.device(a.device) if a.is_cuda else contextlib.nullcontext()
    with here:
        if one.descriptors and capability >= _TMA and depth % 16 == 0:
            programs = min(tiles, processors)
            left = TensorDescriptor.from_tensor(a, [one.m, one.k])
            right = TensorDescriptor.from_tensor(b, [one.n, one.k])
            _descriptors[(programs,)](left, right, *common, programs, **constants)
        else:
            _pointers[(tiles,)](a, b, *common, **constants)
    return out
