"""Encoder of NF4; layout as in codecs/flat_blocks.py, table as in codecs/nf4.py."""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs import nf4 as reference
from diffquant.quant.codecs.flat_blocks import SMALLEST_ABSMAX
from diffquant.quant.codecs.triton.launch import launch

__all__ = ["nf4"]

_BLOCKS = 32  # of 64 weights, in a program
_WARPS = 4
_SMALLEST = int(SMALLEST_ABSMAX.view(np.int32))  # its bits


@triton.jit(do_not_specialize=["count"])
def _flat(src, bounds, packed, absmax, count, SMALLEST: tl.constexpr, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: weights beyond 2**31 bytes
    block = tl.arange(0, BLOCKS)
    column = tl.arange(0, 64)
    left = count - first * 64  # weights from here on
    offset = block[:, None] * 64 + column[None, :]
    x = tl.load(src + first * 64 + offset, mask=offset < left, other=0.0).to(tl.float32)
    exists = block * 64 < left
    whole = block * 64 + 64 <= left  # the last block of a weight may be partial
    most = tl.max(tl.abs(x), axis=1)
    # Below the smallest normal number: as a literal it would be a float64.
    smallest = tl.full(most.shape, SMALLEST, tl.int32).to(tl.float32, bitcast=True)
    floor = tl.where(most < smallest, smallest, most)
    tl.store(absmax + first + block, tl.where(whole, most, floor), mask=exists)
    inverse = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), floor)
    quotient = tl.div_rn(x, tl.broadcast_to(floor[:, None], (BLOCKS, 64)))
    scaled = tl.where(whole[:, None], x * inverse[:, None], quotient)
    # Index = how many bounds lie below; what is not there counts as 0, whose index is 7.
    index = tl.zeros((BLOCKS, 64), tl.int32)
    for i in tl.static_range(15):
        index += (tl.load(bounds + i) < scaled).to(tl.int32)
    high, low = tl.split(tl.reshape(index, (BLOCKS, 32, 2)))
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = (high << 4 | low).to(tl.uint8)
    tl.store(packed + first * 32 + place, byte, mask=place * 2 < left)


@functools.cache
def _bounds(device: torch.device) -> Tensor:
    return torch.from_numpy(reference.BOUNDS).to(device)


def nf4(weight: Tensor, stats: None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows, R * K a multiple of 64 unless they end the tensor; quant/backends.py."""
    del stats, fmt
    count, device = weight.numel(), weight.device
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-count // 64), dtype=torch.float32, device=device)
    programs = -(-count // (64 * _BLOCKS))
    bounds = _bounds(device)
    launch(
        _flat,
        programs,
        _WARPS,
        weight,
        bounds,
        packed,
        absmax,
        count,
        SMALLEST=_SMALLEST,
        BLOCKS=_BLOCKS,
    )
    return {"weight": packed, "absmax": absmax}
