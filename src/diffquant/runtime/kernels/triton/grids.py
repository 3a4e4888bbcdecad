"""ggml's IQ formats: a scale, a point of a grid, signs; layouts as in quant/codecs/iq2_xxs.py etc.

A run is one point of a grid, eight weights (four in IQ3), whatever shares a scale: so a point is
read at once and everything else is one number per run.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from diffquant.runtime.kernels.fields import Kernel
from diffquant.runtime.kernels.triton.bits import byte, even_signs, half, number, word
from diffquant.runtime.kernels.triton.blocks import of_blocks
from diffquant.runtime.kernels.triton.tables import table

__all__ = ["KERNELS"]


@triton.jit
def _points(table, index, WIDTH: tl.constexpr):
    """Points of a grid: (runs, WIDTH) float32."""
    offset = index[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return tl.load(table + offset).to(tl.float32)


@triton.jit
def _expand(d, table, index, signs, WIDTH: tl.constexpr):
    """Scale times point, bit j of `signs` for weight j: (runs, WIDTH) float32."""
    weight = d[:, None] * _points(table, index, WIDTH)
    # Minus as a bit: the language subtracts from 0, which makes 0 of 0 and not -0.
    minus = signs[:, None] << (31 - tl.arange(0, WIDTH))[None, :] & -2147483648
    return (weight.to(tl.int32, bitcast=True) ^ minus).to(tl.float32, bitcast=True)


@triton.jit
def _long_word(src, offset, mask):
    """The uint32 of four times seven signs and a scale, and the scale: (runs,) int32."""
    bits = word(src, offset, mask) | word(src, offset + 2, mask) << 16
    return bits, bits >> 28 & 15


@triton.jit
def _iq2_xxs(src, block, sub, mask, table, GROUP: tl.constexpr):
    start = block + 2 + sub // 4 * 8
    signs, scale = _long_word(src, start + 4, mask)
    d = half(src, block, mask) * (0.5 + number(scale, 0)) * 0.25
    signs = even_signs(signs >> sub % 4 * 7 & 127)
    return (_expand(d, table, byte(src, start + sub % 4, mask), signs, 8),)


@triton.jit
def _iq2_xs(src, block, sub, mask, table, GROUP: tl.constexpr):
    both = word(src, block + 2 + sub * 2, mask)
    scale = byte(src, block + 66 + sub // 4, mask) >> sub // 2 % 2 * 4 & 15
    d = half(src, block, mask) * (0.5 + number(scale, 0)) * 0.25
    return (_expand(d, table, both & 511, even_signs(both >> 9), 8),)


@triton.jit
def _iq2_s(src, block, sub, mask, table, GROUP: tl.constexpr):
    scale = byte(src, block + 74 + sub // 4, mask) >> sub // 2 % 2 * 4 & 15
    d = half(src, block, mask) * (0.5 + number(scale, 0)) * 0.25
    upper = byte(src, block + 66 + sub // 4, mask) >> sub % 4 * 2 & 3
    index = byte(src, block + 2 + sub, mask) | upper << 8
    return (_expand(d, table, index, byte(src, block + 34 + sub, mask), 8),)


@triton.jit
def _iq3_xxs(src, block, sub, mask, table, GROUP: tl.constexpr):
    signs, scale = _long_word(src, block + 66 + sub // 8 * 4, mask)
    d = half(src, block, mask) * (0.5 + number(scale, 0)) * 0.5
    signs = even_signs(signs >> sub // 2 % 4 * 7 & 127) >> sub % 2 * 4
    return (_expand(d, table, byte(src, block + 2 + sub, mask), signs, 4),)


@triton.jit
def _iq3_s(src, block, sub, mask, table, GROUP: tl.constexpr):
    scale = byte(src, block + 106 + sub // 16, mask) >> sub // 8 % 2 * 4 & 15
    d = half(src, block, mask) * (1.0 + 2.0 * number(scale, 0))
    upper = byte(src, block + 66 + sub // 8, mask) >> sub % 8 & 1
    index = byte(src, block + 2 + sub, mask) | upper << 8
    signs = byte(src, block + 74 + sub // 2, mask) >> sub % 2 * 4
    return (_expand(d, table, index, signs, 4),)


@triton.jit
def _shifted(scale, table, index, negative):
    """Scale times (point + 1/8), or - 1/8 where `negative`: (runs, 8) float32."""
    shift = tl.where(negative != 0, -0.125, 0.125)
    return scale[:, None] * (_points(table, index, 8) + shift[:, None])


@triton.jit
def _iq1_s(src, block, sub, mask, table, GROUP: tl.constexpr):
    both = word(src, block + 34 + sub // 4 * 2, mask)
    scale = half(src, block, mask) * number(2 * (both >> 12 & 7) + 1, 0)
    index = byte(src, block + 2 + sub, mask) | (both >> sub % 4 * 3 & 7) << 8
    return (_shifted(scale, table, index, both >> 15),)


@triton.jit
def _iq1_m(src, block, sub, mask, table, GROUP: tl.constexpr):
    # The float16 scale lies in the top nibbles of the four words of scales.
    bits = word(src, block + 48, mask) >> 12 | word(src, block + 50, mask) >> 12 << 4
    bits |= word(src, block + 52, mask) >> 12 << 8 | word(src, block + 54, mask) >> 12 << 12
    d = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    three = word(src, block + 48 + sub // 8 * 2, mask) >> sub // 2 % 4 * 3 & 7
    nibble = byte(src, block + 32 + sub // 2, mask) >> sub % 2 * 4 & 15
    index = byte(src, block + sub, mask) | (nibble & 7) << 8
    return (_shifted(d * number(2 * three + 1, 0), table, index, nibble >> 3),)


KERNELS: Mapping[str, Kernel] = {
    "iq2_xxs": of_blocks("iq2_xxs", _iq2_xxs, 8, table("iq2_xxs")),
    "iq2_xs": of_blocks("iq2_xs", _iq2_xs, 8, table("iq2_xs")),
    "iq2_s": of_blocks("iq2_s", _iq2_s, 8, table("iq2_s")),
    "iq3_xxs": of_blocks("iq3_xxs", _iq3_xxs, 4, table("iq3_xxs")),
    "iq3_s": of_blocks("iq3_s", _iq3_s, 4, table("iq3_s")),
    "iq1_s": of_blocks("iq1_s", _iq1_s, 8, table("iq1_s")),
    "iq1_m": of_blocks("iq1_m", _iq1_m, 8, table("iq1_s")),  # the same grid
}
