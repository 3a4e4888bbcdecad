"""Encoder of Q6_K; layout as in codecs/q6_k.py. Without importance.

One lane is a sub-block of 16, sixteen neighbouring lanes are a super-block.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.triton.launch import lanes, launch
from diffquant.quant.codecs.triton.numbers import elements, nearest_int, store_bytes, store_half
from diffquant.quant.codecs.triton.symmetric_search import symmetric_search

__all__ = ["q6_k"]

_STEPS = (0, *range(-9, 0), *range(1, 10))


@triton.jit
def _most(scale, BLOCKS: tl.constexpr):
    """(16 B,) -> (B,): the first scale of largest magnitude of every super-block."""
    scale = tl.reshape(scale, (BLOCKS, 16))
    size = tl.abs(scale)
    place = tl.arange(0, 16)[None, :]
    first = tl.min(tl.where(size == tl.max(size, axis=1)[:, None], place, 16), axis=1)
    return tl.sum(tl.where(place == first[:, None], scale, 0.0), axis=1)  # one, and zeros: exact


@triton.jit
def _quarters(level, BLOCKS: tl.constexpr):
    """(16 B,) levels -> four of (4 B,): a, b, c, d of every half and part of 16."""
    level = tl.permute(tl.reshape(level, (BLOCKS, 2, 2, 2, 2)), (0, 1, 4, 3, 2))
    first, second = tl.split(tl.reshape(level, (BLOCKS * 8, 2)))  # a b.. and c d..
    a, b = tl.split(tl.reshape(first, (BLOCKS * 4, 2)))
    c, d = tl.split(tl.reshape(second, (BLOCKS * 4, 2)))
    return a, b, c, d


@triton.jit
def _super_blocks(src, dst, grids, blocks, COUNT: tl.constexpr, LANES: tl.constexpr):
    BLOCKS: tl.constexpr = LANES // 16
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # 64 bits: weights beyond 2**31 bytes
    src += first * 256
    dst += first * 210
    lane = tl.arange(0, LANES)
    exists = lane // 16 < blocks - first
    x = elements(src, lane, exists, 16)
    scale, factor, nothing = symmetric_search(x, grids, COUNT, 32)

    block = tl.arange(0, BLOCKS)
    mask = block < blocks - first
    most = _most(scale, BLOCKS)
    empty = tl.abs(most) < 1e-15  # stored as zeros throughout
    inverse = tl.div_rn(tl.full(most.shape, -128.0, tl.float32), tl.where(empty, 1.0, most))
    size = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), inverse)
    size = store_half(dst, block * 210 + 208, tl.where(empty, 0.0, size), mask)
    scales = nearest_int(inverse[:, None] * tl.reshape(scale, (BLOCKS, 16)))
    # 127 at most, kept in a byte as in C; 0 where the super-block is empty
    scales = (tl.minimum(scales, 127) & 255 ^ 128) - 128
    scales = tl.where(empty[:, None], 0, scales)
    place = dst + (block[:, None] * 210 + 192 + tl.arange(0, 16)[None, :])
    tl.store(place, (scales & 255).to(tl.uint8), mask=mask[:, None])

    # Levels against what is stored; where the scale rounded to 0, those that the search found.
    d = tl.reshape(size[:, None] * scales.to(tl.float32), (LANES,))
    zero = tl.reshape(tl.broadcast_to(empty[:, None], (BLOCKS, 16)), (LANES,)) | nothing & (d == 0)
    divisor = tl.where(d != 0.0, d, 1.0)
    low_a, low_b, upper = (), (), ()
    for i in tl.static_range(16):
        level = nearest_int(tl.div_rn(x[i], divisor))
        level = tl.where(d != 0.0, level, nearest_int(factor * x[i]))
        level = tl.minimum(tl.maximum(level, -32), 31) + 32
        a, b, c, e = _quarters(tl.where(zero, 0, level), BLOCKS)
        low_a = low_a + (a & 15 | (c & 15) << 4,)
        low_b = low_b + (b & 15 | (e & 15) << 4,)
        upper = upper + (a >> 4 | b >> 4 << 2 | c >> 4 << 4 | e >> 4 << 6,)
    part = tl.arange(0, BLOCKS * 4)  # of 16 weights in every quarter: halves, then parts
    start = part // 4 * 210
    mask = part // 4 < blocks - first
    nibble = start + part // 2 % 2 * 64 + part % 2 * 16
    store_bytes(dst, nibble, low_a, mask, tl.int16, 2)
    store_bytes(dst, nibble + 32, low_b, mask, tl.int16, 2)
    place = start + 128 + part // 2 % 2 * 32 + part % 2 * 16
    store_bytes(dst, place, upper, mask, tl.int16, 2)


@functools.cache
def _grids(device: torch.device) -> Tensor:
    """Minus the intervals of every candidate, rounded as the CPU's search rounds them."""
    step, half = np.float32(0.1), np.float32(32)
    found = np.array([-(half + step * np.float32(i)) for i in _STEPS], np.float32)
    return torch.from_numpy(found).to(device)


def q6_k(weight: Tensor, stats: None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of 256; see quant/backends.py."""
    del stats
    rows, width = weight.shape
    blocks, (count, warps) = weight.numel() // 256, lanes(fmt)
    packed = torch.empty((rows, width // 256 * 210), dtype=torch.uint8, device=weight.device)
    launch(
        _super_blocks,
        -(-blocks * 16 // count),
        warps,
        weight,
        packed,
        _grids(weight.device),
        blocks,
        COUNT=len(_STEPS),
        LANES=count,
    )
    return {"weight": packed}
