"""ggml's blocks of 256 weights with scales of their own scales; see quant/codecs/q4_k.py etc.

Bits of several weights share a byte, so a unit of blocks.py has several planes. Half of a block of
2-, 3- or 6-bit weights is eight runs of 16 with a scale each: unit `h` of the two has planes
h, 2 + h, 4 + h and 6 + h.
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
def _pair(packed, plane: tl.constexpr):
    """Two bits of each byte: (units, 16) int32."""
    return packed >> 2 * plane & 3


@triton.jit
def _q2_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    run = sub // 2 * 8 + sub % 2
    packed = weights(src, block + 16 + sub * 16, mask, 16, GROUP)
    d, dmin = half(src, block + 80, mask), half(src, block + 82, mask)
    planes = ()
    for i in tl.static_range(4):
        both = byte(src, block + run + 2 * i, mask)
        scale, minimum = number(both & 15, 0) * d, number(both >> 4, 0) * dmin
        q = number(_pair(packed, i), 0)
        planes += (q * scale[:, None] - minimum[:, None],)
    return planes


@triton.jit
def _q3_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    upper, side = sub // 2, sub % 2  # half of the block, half of a plane's stride
    packed = weights(src, block + 32 + sub * 16, mask, 16, GROUP)
    third = weights(src, block + side * 16, mask, 16, GROUP) >> (upper * 4)[:, None]
    d = half(src, block + 108, mask)
    # Run 8 * upper + 2 * i + side: its scale's low nibble in byte 2 * i + side, its upper two bits
    # in byte (2 * i + side) % 4 of the next four.
    two, two_more = byte(src, block + 104 + side, mask), byte(src, block + 106 + side, mask)
    planes = ()
    for i in tl.static_range(4):
        nibble = byte(src, block + 96 + 2 * i + side, mask) >> upper * 4 & 15
        top = (two if i % 2 == 0 else two_more) >> upper * 4 + i // 2 * 2 & 3
        scale = d * number(nibble | top << 4, 32)
        q = _pair(packed, i) | (third >> i & 1) << 2
        planes += (scale[:, None] * number(q, 4),)
    return planes


@triton.jit
def _scales_and_minima(src, block, sub, mask):
    """Of runs 2 * sub and 2 * sub + 1 of Q4_K or Q5_K: ((units,) float32, minimum) twice.

    6-bit numbers as kernels/reference.py draws them; both runs are of the same half of the eight.
    """
    place = block + 4 + sub % 2 * 2
    first, second, third = (
        word(src, place, mask),
        word(src, place + 4, mask),
        word(src, place + 8, mask),
    )
    early = sub < 2
    # Two bytes at a time: what they hold keeps to its own byte.
    scale = tl.where(early, first & 0x3F3F, third & 0x0F0F | first >> 2 & 0x3030)
    minimum = tl.where(early, second & 0x3F3F, third >> 4 & 0x0F0F | second >> 2 & 0x3030)
    d, dmin = half(src, block, mask), half(src, block + 2, mask)
    return (
        (d * number(scale & 63, 0))[:, None],
        (dmin * number(minimum & 63, 0))[:, None],
        (d * number(scale >> 8, 0))[:, None],
        (dmin * number(minimum >> 8, 0))[:, None],
    )


@triton.jit
def _q4_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    scale, minimum, scale_2, minimum_2 = _scales_and_minima(src, block, sub, mask)
    packed = weights(src, block + 16 + sub * 32, mask, 32, GROUP)
    low, high = number(packed & 15, 0), number(packed >> 4, 0)
    return low * scale - minimum, high * scale_2 - minimum_2


@triton.jit
def _q5_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    scale, minimum, scale_2, minimum_2 = _scales_and_minima(src, block, sub, mask)
    packed = weights(src, block + 48 + sub * 32, mask, 32, GROUP)
    fifth = weights(src, block + 16, mask, 32, GROUP) >> (sub * 2)[:, None]
    low = number(packed & 15 | (fifth & 1) << 4, 0)
    high = number(packed >> 4 | (fifth & 2) << 3, 0)
    return low * scale - minimum, high * scale_2 - minimum_2


@triton.jit
def _q6_k(src, block, sub, mask, table, GROUP: tl.constexpr):
    upper, side = sub // 2, sub % 2
    first = block + upper * 64 + side * 16
    low, low_more = (
        weights(src, first, mask, 16, GROUP),
        weights(src, first + 32, mask, 16, GROUP),
    )
    high = weights(src, block + 128 + sub * 16, mask, 16, GROUP)
    d = half(src, block + 208, mask)
    planes = ()
    for i in tl.static_range(4):
        scale = int8(byte(src, block + 192 + upper * 8 + side + 2 * i, mask)) * d
        nibble = (low if i % 2 == 0 else low_more) >> i // 2 * 4 & 15
        planes += (number(nibble | _pair(high, i) << 4, 32) * scale[:, None],)
    return planes


@triton.jit
def _iq4_xs(src, block, sub, mask, table, GROUP: tl.constexpr):
    upper = word(src, block + 2, mask) >> sub * 2 & 3
    lower = byte(src, block + 4 + sub // 2, mask) >> sub % 2 * 4 & 15
    scale = (half(src, block, mask) * number(lower | upper << 4, 32))[:, None]
    packed = weights(src, block + 8 + sub * 16, mask, 16, GROUP)
    return scale * tl.load(table + (packed & 15)), scale * tl.load(table + (packed >> 4))


KERNELS: Mapping[str, BlockKernel] = {
    "q2_k": of_blocks("q2_k", _q2_k, 16, planes=4, stride=32),
    "q3_k": of_blocks("q3_k", _q3_k, 16, planes=4, stride=32),
    "q4_k": of_blocks("q4_k", _q4_k, 32, planes=2),
    "q5_k": of_blocks("q5_k", _q5_k, 32, planes=2),
    "q6_k": of_blocks("q6_k", _q6_k, 16, planes=4, stride=32),
    "iq4_xs": of_blocks("iq4_xs", _iq4_xs, 16, table("iq4"), planes=2),
}
