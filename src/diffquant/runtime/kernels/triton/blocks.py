"""Block formats: one kernel and one launch for all; a format is a function that decodes a tile.

A weight is a sequence of blocks of `nbytes`, and a block one of units: as many bytes as a thread or
a few decode together. Where a byte holds parts of several weights, a unit has several planes, so
that each byte is read once. A plane is `width` weights in a row; those of a unit lie `stride`
weights apart, and the units between two planes of one are its neighbours:

    q8_0   1 plane of 32        q4_k   2 planes of 32, 32 apart: low nibbles, high nibbles
    q4_0   2 planes of 16       q6_k   4 planes of 16, 32 apart: bits 0-1, 2-3, 4-5, 6-7 of a byte

A program takes a tile of whole blocks, wherever rows of the weight end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels.fields import Parts
from diffquant.runtime.kernels.reference import KERNELS as REFERENCE
from diffquant.runtime.kernels.triton.launch import aligned, group, launch, tile

__all__ = ["BlockKernel", "Table", "of_blocks", "unit_start"]

Table = Callable[[torch.device], Tensor]


@triton.jit
def unit_start(unit, WIDTH: tl.constexpr, PLANES: tl.constexpr, STRIDE: tl.constexpr):
    """Where the first plane of units begins, in weights: (units,)."""
    if STRIDE == WIDTH:
        return unit * (WIDTH * PLANES)
    beside: tl.constexpr = STRIDE // WIDTH  # units between two planes of one, itself counted
    return unit // beside * (STRIDE * PLANES) + unit % beside * WIDTH


@triton.jit
def _blocks(
    src,
    table,
    dst,
    units,
    DECODE: tl.constexpr,
    UNITS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    STRIDE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    NBYTES: tl.constexpr,
    GROUP: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * UNITS  # 64 bits: weights beyond 2**31 bytes
    src += first // PER_BLOCK * NBYTES
    dst += first * (WIDTH * PLANES)
    unit = tl.arange(0, UNITS)
    mask = unit < units - first
    planes = DECODE(src, unit // PER_BLOCK * NBYTES, unit % PER_BLOCK, mask, table, GROUP)
    start = unit_start(unit, WIDTH, PLANES, STRIDE)
    offset = start[:, None] + tl.arange(0, WIDTH)[None, :]
    for i in tl.static_range(PLANES):
        value = planes[i].to(dst.dtype.element_ty)
        tl.store(dst + i * STRIDE + offset, value, mask=mask[:, None])


@dataclass(frozen=True, slots=True)
class BlockKernel:
    """The decoder of a format; see fields.Kernel.

    Attributes:
        name: FORMATS name of a format whose only part is `weight`.
        decode: device function (src, block, sub, mask, table, GROUP) -> a tuple of planes, each
            (units, width) float32. `block` (units,) is the offset of each unit's block, `sub` the
            unit's place in it.
        width: weights of a plane.
        table: what the format looks up, on the given device.
        planes: of a unit.
        stride: weights from a plane to the next one of its unit, a multiple of `width`.
    """

    name: str
    decode: Any
    width: int
    table: Table | None = None
    planes: int = 1
    stride: int = 0

    @property
    def constants(self) -> dict[str, Any]:
        """What kernels of block formats are told of this one."""
        row = FORMATS[self.name]
        return {
            "DECODE": self.decode,
            "WIDTH": self.width,
            "PLANES": self.planes,
            "STRIDE": self.stride or self.width,
            "PER_BLOCK": row.block_size // (self.width * self.planes),
            "NBYTES": row.nbytes((1, row.block_size)),
        }

    def __call__(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Decode to `shape` in `dtype`."""
        row = FORMATS[self.name]
        size, nbytes = row.block_size, row.nbytes((1, row.block_size))
        stored, count = parts["weight"], math.prod(shape)
        if stored.dtype != torch.uint8 or stored.numel() * size != count * nbytes:
            return REFERENCE[self.name](parts, shape, dtype)
        weight, (weights, warps) = aligned(stored), tile(self.name)
        unit = self.width * self.planes
        out = torch.empty(shape, dtype=dtype, device=weight.device)
        launch(
            _blocks,
            -(-count // weights),
            warps,
            weight,
            self.table(weight.device) if self.table else weight,
            out,
            count // unit,
            UNITS=weights // unit,
            GROUP=group(dtype),
            **self.constants,
        )
        return out


def of_blocks(
    name: str,
    decode: object,
    width: int,
    table: Table | None = None,
    *,
    planes: int = 1,
    stride: int = 0,
) -> BlockKernel:
    """Make the kernel of a format; see BlockKernel."""
    return BlockKernel(name, decode, width, table, planes, stride)
