"""Encoders of bitsandbytes' 4 bits, plain and with absmax quantized again.

Layout as in codecs/flat_blocks.py and double_quant.py, tables as in nf4.py and fp4_bnb.py there.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs import fp4_bnb as fp4_reference
from diffquant.quant.codecs import nf4 as nf4_reference
from diffquant.quant.codecs.double_quant import NESTED_BLOCK, Mean
from diffquant.quant.codecs.dynamic_map import STEP_CODES, STEPS
from diffquant.quant.codecs.flat_blocks import SMALLEST_ABSMAX
from diffquant.quant.codecs.triton.launch import launch
from diffquant.quant.codecs.triton.scales import magnitude_bits

__all__ = ["double_quant", "fp4_bnb", "nf4"]

_BLOCKS = 32  # of 64 weights, in a program
_NESTED = 8  # of 256 absmax, in a program
_WARPS = 4
_SMALLEST = int(SMALLEST_ABSMAX.view(np.int32))  # its bits
_ASCENDING = np.arange(16, dtype=np.uint8)
_TABLES = {
    "nf4": (nf4_reference.BOUNDS, _ASCENDING),
    "fp4": (fp4_reference.BOUNDS, fp4_reference.ORDER),
}  # bounds between ascending values, their codes


@triton.jit(do_not_specialize=["count"])
def _flat(
    src,
    bounds,
    codes,
    packed,
    absmax,
    count,
    SMALLEST: tl.constexpr,
    ASCENDING: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: weights beyond 2**31 bytes
    block = tl.arange(0, BLOCKS)
    column = tl.arange(0, 64)
    left = count - first * 64  # weights from here on
    offset = block[:, None] * 64 + column[None, :]
    x = tl.load(src + first * 64 + offset, mask=offset < left, other=0.0).to(tl.float32)
    exists = block * 64 < left
    whole = block * 64 + 64 <= left  # the last block of a weight may be partial
    most = tl.max(magnitude_bits(x), axis=1).to(tl.float32, bitcast=True)
    # Below the smallest normal number: as a literal it would be a float64.
    smallest = tl.full(most.shape, SMALLEST, tl.int32).to(tl.float32, bitcast=True)
    floor = tl.where(most < smallest, smallest, most)
    tl.store(absmax + first + block, tl.where(whole, most, floor), mask=exists)
    inverse = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), floor)
    quotient = tl.div_rn(x, tl.broadcast_to(floor[:, None], (BLOCKS, 64)))
    scaled = tl.where(whole[:, None], x * inverse[:, None], quotient)
    # Index = how many bounds lie below: all of them below NaN. What is not there counts as 0, whose
    # index is 7.
    index = tl.full((BLOCKS, 64), 15, tl.int32)
    for i in tl.static_range(15):
        index -= (tl.load(bounds + i) >= scaled).to(tl.int32)
    code = index if ASCENDING else tl.load(codes + index).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (BLOCKS, 32, 2)))
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = (high << 4 | low).to(tl.uint8)
    tl.store(packed + first * 32 + place, byte, mask=place * 2 < left)


@triton.jit(do_not_specialize=["count"])
def _again(
    absmax,
    offset,
    step_codes,
    codes,
    nested,
    count,
    STEPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    first = tl.program_id(0) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    place = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = place < count
    moved = tl.load(absmax + place, mask=mask, other=0.0) - tl.load(offset)
    moved = tl.where(mask, moved, 0.0)
    most = tl.max(magnitude_bits(moved), axis=1).to(tl.float32, bitcast=True)
    tl.store(nested + block, most, mask=block * SIZE < count)
    inverse = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), most)
    step = (moved * inverse[:, None] + 1.0) * (0.5 * STEPS) + 0.5
    step = tl.where(step > 0.0, step, 0.0)  # NaN too: an infinite inverse times 0
    step = tl.where(step < STEPS, step, 1.0 * STEPS).to(tl.int32)
    code = tl.load(step_codes + step)
    tl.store(codes + place, tl.where(most[:, None] != 0.0, code, 0), mask=mask)


@functools.cache
def _tables(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    bounds, codes = _TABLES[name]
    return torch.from_numpy(bounds).to(device), torch.from_numpy(codes).to(device)


@functools.cache
def _step_codes(device: torch.device) -> Tensor:
    return torch.from_numpy(STEP_CODES).to(device)


def _encode(name: str, weight: Tensor, stats: None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows, R * K a multiple of 64 unless they end the tensor; quant/backends.py."""
    del stats, fmt
    count, device = weight.numel(), weight.device
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-count // 64), dtype=torch.float32, device=device)
    bounds, codes = _tables(name, device)
    launch(
        _flat,
        -(-count // (64 * _BLOCKS)),
        _WARPS,
        weight,
        bounds,
        codes,
        packed,
        absmax,
        count,
        SMALLEST=_SMALLEST,
        ASCENDING=_TABLES[name][1] is _ASCENDING,
        BLOCKS=_BLOCKS,
    )
    return {"weight": packed, "absmax": absmax}


nf4 = functools.partial(_encode, "nf4")
fp4_bnb = functools.partial(_encode, "fp4")


def double_quant(weight: Tensor, stats: Mean | None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows and their absmax again, R * K a multiple of 16384 at all but the end.

    `stats` is the sum and the number of all absmax; without it those of these rows.
    """
    parts = _encode(fmt.removesuffix("_dq"), weight, fmt=fmt)
    absmax, device = parts["absmax"], weight.device
    count = absmax.numel()
    total, number = stats or (absmax.cpu().numpy().sum(dtype=np.float64), count)
    offset = float(np.float32(total / max(number, 1)))
    codes = torch.empty(count, dtype=torch.uint8, device=device)
    nested = torch.empty(-(-count // NESTED_BLOCK), dtype=torch.float32, device=device)
    mean = torch.full((), offset, dtype=torch.float32, device=device)
    launch(
        _again,
        -(-count // (NESTED_BLOCK * _NESTED)),
        _WARPS,
        absmax,
        mean,
        _step_codes(device),
        codes,
        nested,
        count,
        STEPS=STEPS,
        SIZE=NESTED_BLOCK,
        BLOCKS=_NESTED,
    )
    return {
        "weight": parts["weight"],
        "absmax": codes,
        "nested_absmax": nested,
        "nested_offset": mean,
    }
