"""ggml's blocks of 256 weights with scales of their own scales; see quant/codecs/q4_k.py etc.

The order of the weights of a block is that of runs: where several runs share bytes (one reads the
low nibbles, the next the high ones), each reads them, the second time from the nearest cache.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from diffquant.runtime.kernels.triton.bits import byte, half, int8, number, weights, word
from diffquant.runtime.kernels.triton.blocks import BlockKernel, of_blocks
from diffquant.runtime.kernels.triton.tables import table

__all__ = ["KERNELS"]


@triton.jit
def _pairs(src, first, sub, mask, GROUP: tl.constexpr):
    """Two bits of each weight, sixteen runs of 16: four runs of 32 lie in the same 32 bytes."""
    start = first + sub // 8 * 32 + sub % 2 * 16
    packed = weights(src, start, tl.arange(0, 16), mask, GROUP)
    return packed >> (sub % 8 // 2 * 2)[:, None] & 3


@triton.jit
def _q2_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    both = byte(src, block + sub, mask)
    scale = number(both & 15, 0) * half(src, block + 80, mask)
    minimum = number(both >> 4, 0) * half(src, block + 82, mask)
    q = number(_pairs(src, block + 16, sub, mask, GROUP), 0)
    return q * scale[:, None] - minimum[:, None]


@triton.jit
def _q3_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    nibble = byte(src, block + 96 + sub % 8, mask) >> sub // 8 * 4 & 15
    upper = byte(src, block + 104 + sub % 4, mask) >> sub // 4 * 2 & 3
    scale = half(src, block + 108, mask) * number(nibble | upper << 4, 32)
    third = weights(src, block + sub % 2 * 16, tl.arange(0, 16), mask, GROUP)
    third = third >> (sub // 2)[:, None] & 1
    q = _pairs(src, block + 32, sub, mask, GROUP) | third << 2
    return scale[:, None] * number(q, 4)


@triton.jit
def _scale_and_minimum(src, block, sub, mask):
    """Of Q4_K's or Q5_K's eight runs: (runs,) float32 each; 6-bit numbers as reference.py draws."""
    first = byte(src, block + 4 + sub % 4, mask)
    second = byte(src, block + 8 + sub % 4, mask)
    third = byte(src, block + 12 + sub % 4, mask)
    scale = tl.where(sub < 4, first & 63, third & 15 | first >> 2 & 48)
    minimum = tl.where(sub < 4, second & 63, third >> 4 | second >> 2 & 48)
    d, dmin = half(src, block, mask), half(src, block + 2, mask)
    return d * number(scale, 0), dmin * number(minimum, 0)


@triton.jit
def _nibbles(src, first, sub, mask, GROUP: tl.constexpr):
    """Nibbles of eight runs of 32: 32 bytes hold one run low and the next one high."""
    packed = weights(src, first + sub // 2 * 32, tl.arange(0, 32), mask, GROUP)
    return packed >> (sub % 2 * 4)[:, None] & 15


@triton.jit
def _q4_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    scale, minimum = _scale_and_minimum(src, block, sub, mask)
    q = number(_nibbles(src, block + 16, sub, mask, GROUP), 0)
    return q * scale[:, None] - minimum[:, None]


@triton.jit
def _q5_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    scale, minimum = _scale_and_minimum(src, block, sub, mask)
    fifth = weights(src, block + 16, tl.arange(0, 32), mask, GROUP) >> sub[:, None] & 1
    q = _nibbles(src, block + 48, sub, mask, GROUP) | fifth << 4
    return number(q, 0) * scale[:, None] - minimum[:, None]


@triton.jit
def _q6_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    scale = int8(byte(src, block + 192 + sub, mask)) * half(src, block + 208, mask)
    low = weights(src, block + sub // 8 * 64 + sub % 4 * 16, tl.arange(0, 16), mask, GROUP)
    low = low >> (sub % 8 // 4 * 4)[:, None] & 15
    q = low | _pairs(src, block + 128, sub, mask, GROUP) << 4
    return number(q, 32) * scale[:, None]


@triton.jit
def _iq4_xs(src, block, sub, mask, table, GROUP: tl.constexpr):
    upper = word(src, block + 2, mask) >> sub * 2 & 3
    lower = byte(src, block + 4 + sub // 2, mask) >> sub % 2 * 4 & 15
    scale = half(src, block, mask) * number(lower | upper << 4, 32)
    column = tl.arange(0, 32)
    packed = weights(src, block + 8 + sub * 16, column % 16, mask, GROUP)
    return scale[:, None] * tl.load(table + (packed >> (column // 16 * 4)[None, :] & 15))


KERNELS: Mapping[str, BlockKernel] = {
    "q2_k": of_blocks("q2_k", _q2_k, 16),
    "q3_k": of_blocks("q3_k", _q3_k, 16),
    "q4_k": of_blocks("q4_k", _q4_k, 32),
    "q5_k": of_blocks("q5_k", _q5_k, 32),
    "q6_k": of_blocks("q6_k", _q6_k, 16),
    "iq4_xs": of_blocks("iq4_xs", _iq4_xs, 32, table("iq4")),
}
