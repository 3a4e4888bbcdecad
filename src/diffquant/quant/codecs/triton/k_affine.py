"""Encoders of Q4_K and Q5_K; layout as in codecs/k_affine.py. Without importance.

One lane is a sub-block of 32, eight neighbouring lanes are a super-block.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs import q4_k as q4
from diffquant.quant.codecs import q5_k as q5
from diffquant.quant.codecs.affine_search import Candidates
from diffquant.quant.codecs.triton.affine_search import (
    affine_levels,
    affine_search,
    spread_weights,
)
from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import (
    elements,
    nearest_int,
    store_bytes,
    store_half,
)
from diffquant.quant.codecs.triton.super_blocks import halves_of, round_steps

__all__ = ["grids_of", "q4_k", "q5_k"]


@triton.jit
def _store_steps(dst, block, scale, low, mask, BLOCKS: tl.constexpr):
    scale_first, scale_last = halves_of(scale, BLOCKS, 8)
    low_first, low_last = halves_of(low, BLOCKS, 8)
    place = dst + block[:, None] + tl.arange(0, 4)[None, :]
    mask = mask[:, None]
    tl.store(place + 4, (scale_first | scale_last >> 4 << 6).to(tl.uint8), mask=mask)
    tl.store(place + 8, (low_first | low_last >> 4 << 6).to(tl.uint8), mask=mask)
    tl.store(place + 12, (scale_last & 15 | low_last << 4 & 240).to(tl.uint8), mask=mask)


@triton.jit
def _super_blocks(
    src,
    dst,
    grids,
    blocks,
    COUNT: tl.constexpr,
    TOP: tl.constexpr,
    NBYTES: tl.constexpr,
    LANES: tl.constexpr,
):
    BLOCKS: tl.constexpr = LANES // 8
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: weights beyond 2**31 bytes
    src += first * 256
    dst += first * NBYTES
    lane = tl.arange(0, LANES)
    x = elements(src, lane, lane // 8 < blocks - first, 32)
    base = spread_weights(x)
    scale, low, factor, start = affine_search(x, base, grids, COUNT, TOP, False)

    block = tl.arange(0, BLOCKS)
    mask = block < blocks - first
    scales, size = round_steps(scale, BLOCKS, 8, 63)
    lows, low_size = round_steps(-low, BLOCKS, 8, 63)
    scales, lows = tl.minimum(scales, 63), tl.minimum(lows, 63)
    size = store_half(dst, block * NBYTES, size, mask)
    low_size = store_half(dst, block * NBYTES + 2, low_size, mask)
    _store_steps(dst, block * NBYTES, scales, lows, mask, BLOCKS)

    # Levels against what is stored; where the scale rounded to 0, those that the search found.
    d = tl.reshape(size[:, None] * scales.to(tl.float32), (LANES,))
    minimum = tl.reshape(low_size[:, None] * lows.to(tl.float32), (LANES,))
    searched = affine_levels(x, factor, start, TOP)
    divisor = tl.where(d != 0.0, d, 1.0)
    low_nibbles, fifth = (), ()
    pair = tl.arange(0, LANES // 2)
    for i in tl.static_range(32):
        level = nearest_int(tl.div_rn(x[i] + minimum, divisor))
        level = tl.minimum(tl.maximum(level, 0), TOP)
        level = tl.where(d != 0.0, level, searched[i].to(tl.int32))
        even, odd = tl.split(tl.reshape(level & 15, (LANES // 2, 2)))
        low_nibbles = low_nibbles + (even | odd << 4,)
        if TOP > 15:
            bits = tl.reshape((level >> 4) << (lane % 8), (BLOCKS, 8))
            fifth = fifth + (tl.sum(bits, axis=1),)
    at = 16
    if TOP > 15:
        store_bytes(dst, block * NBYTES + 16, fifth, mask, tl.int32, 4)
        at = 48
    place = pair // 4 * NBYTES + pair % 4 * 32 + at
    store_bytes(dst, place, low_nibbles, pair // 4 < blocks - first, tl.int32, 4)


@functools.cache
def grids_of(candidates: Candidates, top: int, device: torch.device) -> Tensor:
    """Intervals of every candidate, rounded as the CPU's search rounds them: (n,) float32."""
    first, step = np.float32(candidates.first), np.float32(candidates.step)
    offsets = [first + step * np.float32(i) for i in range(candidates.steps + 1)]
    found = np.array([offset + np.float32(top) for offset in offsets], np.float32)
    return torch.from_numpy(found).to(device)


def _encode(
    top: int,
    candidates: Candidates,
    nbytes: int,
    weight: Tensor,
    stats: None = None,
    *,
    fmt: str,
) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of 256; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    blocks, (count, warps) = weight.numel() // 256, lanes(fmt)
    packed = torch.empty((rows, width // 256 * nbytes), dtype=torch.uint8, device=weight.device)
    launch(
        _super_blocks,
        -(-blocks * 8 // count),
        warps,
        weight,
        packed,
        grids_of(candidates, top, weight.device),
        blocks,
        COUNT=candidates.steps + 1,
        TOP=top,
        NBYTES=nbytes,
        LANES=count,
    )
    return {"weight": packed}


q4_k = functools.partial(_encode, q4.TOP, q4.CANDIDATES, 144)
q5_k = functools.partial(_encode, q5.TOP, q5.CANDIDATES, 176)
