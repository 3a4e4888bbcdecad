"""Block formats: one kernel and one launch for all; a format is a function that decodes a tile.

A weight is a sequence of blocks of `nbytes`, and a block one of runs: `width` weights that share a
scale. A program takes a tile of whole blocks, wherever rows of the weight end.
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

__all__ = ["BlockKernel", "Table", "of_blocks"]

Table = Callable[[torch.device], Tensor]


@triton.jit
def _blocks(
    src,
    table,
    dst,
    runs,
    DECODE: tl.constexpr,
    RUNS: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    NBYTES: tl.constexpr,
    GROUP: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * RUNS  # 64 bits: weights beyond 2**31 bytes
    src += first // PER_BLOCK * NBYTES
    dst += first * WIDTH
    run = tl.arange(0, RUNS)
    mask = run < runs - first
    value = DECODE(src, run // PER_BLOCK * NBYTES, run % PER_BLOCK, mask, table, GROUP)
    offset = run[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(dst + offset, value.to(dst.dtype.element_ty), mask=mask[:, None])


@dataclass(frozen=True, slots=True)
class BlockKernel:
    """The decoder of a format; see fields.Kernel.

    Attributes:
        name: FORMATS name of a format whose only part is `weight`.
        decode: device function (src, block, sub, mask, table, GROUP) -> (runs, width) float32.
            `block` (runs,) is the offset of each run's block, `sub` its place in the block.
        width: weights in a run.
        table: what the format looks up, on the given device.
    """

    name: str
    decode: Any
    width: int
    table: Table | None = None

    def __call__(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Decode to `shape` in `dtype`."""
        row = FORMATS[self.name]
        size, nbytes = row.block_size, row.nbytes((1, row.block_size))
        stored, count = parts["weight"], math.prod(shape)
        if stored.dtype != torch.uint8 or stored.numel() * size != count * nbytes:
            return REFERENCE[self.name](parts, shape, dtype)
        weight, (weights, warps) = aligned(stored), tile(self.name)
        out = torch.empty(shape, dtype=dtype, device=weight.device)
        launch(
            _blocks,
            -(-count // weights),
            warps,
            weight,
            self.table(weight.device) if self.table else weight,
            out,
            count // self.width,
            DECODE=self.decode,
            RUNS=weights // self.width,
            WIDTH=self.width,
            PER_BLOCK=size // self.width,
            NBYTES=nbytes,
            GROUP=group(dtype),
        )
        return out


def of_blocks(name: str, decode: object, width: int, table: Table | None = None) -> BlockKernel:
    """Make the kernel of a format; see BlockKernel."""
    return BlockKernel(name, decode, width, table)
