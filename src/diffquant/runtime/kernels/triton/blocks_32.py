"""ggml's blocks of 32 (nvfp4: 64) weights; layouts as in quant/codecs/q4_0.py and its siblings."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from diffquant.runtime.kernels.triton.bits import byte, e2m1, half, int8, number, weights, word
from diffquant.runtime.kernels.triton.blocks import BlockKernel, of_blocks
from diffquant.runtime.kernels.triton.tables import table

__all__ = ["KERNELS"]


@triton.jit
def _halves(src, first, mask, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """Nibbles of WIDTH / 2 bytes, all low ones first: (runs, WIDTH) int32."""
    column = tl.arange(0, WIDTH)
    packed = weights(src, first, column % (WIDTH // 2), mask, GROUP)
    return packed >> (column // (WIDTH // 2) * 4)[None, :] & 15


@triton.jit
def _fifths(src, first, mask):
    """The bits of a uint32 per run, as fifth bits of nibbles: (runs, 32) int32."""
    bits = word(src, first, mask) | word(src, first + 2, mask) << 16
    return (bits[:, None] >> tl.arange(0, 32)[None, :] & 1) << 4


@triton.jit
def _q8_0(src, block, sub, mask, table, GROUP: tl.constexpr):
    q = int8(weights(src, block + 2, tl.arange(0, 32), mask, GROUP))
    return q * half(src, block, mask)[:, None]


@triton.jit
def _q4_0(src, block, sub, mask, table, GROUP: tl.constexpr):
    q = _halves(src, block + 2, mask, GROUP, 32)
    return number(q, 8) * half(src, block, mask)[:, None]


@triton.jit
def _q4_1(src, block, sub, mask, table, GROUP: tl.constexpr):
    q = number(_halves(src, block + 4, mask, GROUP, 32), 0)
    return q * half(src, block, mask)[:, None] + half(src, block + 2, mask)[:, None]


@triton.jit
def _q5_0(src, block, sub, mask, table, GROUP: tl.constexpr):
    q = _halves(src, block + 6, mask, GROUP, 32) | _fifths(src, block + 2, mask)
    return number(q, 16) * half(src, block, mask)[:, None]


@triton.jit
def _q5_1(src, block, sub, mask, table, GROUP: tl.constexpr):
    q = _halves(src, block + 8, mask, GROUP, 32) | _fifths(src, block + 4, mask)
    scale, minimum = half(src, block, mask), half(src, block + 2, mask)
    return number(q, 0) * scale[:, None] + minimum[:, None]


@triton.jit
def _iq4_nl(src, block, sub, mask, table, GROUP: tl.constexpr):
    q = _halves(src, block + 2, mask, GROUP, 32)
    return half(src, block, mask)[:, None] * tl.load(table + q)


@triton.jit
def _mxfp4(src, block, sub, mask, table, GROUP: tl.constexpr):
    # Doubled integers, and code 8 is +0; the scale is halved: 2 ** (exponent - 128).
    value = e2m1(_halves(src, block + 1, mask, GROUP, 32)) * 2.0 + 0.0
    exponent = byte(src, block, mask)
    small = 0x00200000 << (exponent & 1)  # the two subnormal ones
    bits = tl.where(exponent < 2, small, (exponent - 1) << 23)
    return bits.to(tl.float32, bitcast=True)[:, None] * value


@triton.jit
def _nvfp4(src, block, sub, mask, table, GROUP: tl.constexpr):
    value = e2m1(_halves(src, block + 4 + sub * 8, mask, GROUP, 16)) * 2.0 + 0.0
    code = byte(src, block + sub, mask)
    # Half of an unsigned e4m3: 2**119; its NaN counts as 0, if the sign bit is not set.
    scale = ((code & 127) << 20).to(tl.float32, bitcast=True) * 6.64613997892458e35
    return tl.where(code == 127, 0.0, scale)[:, None] * value


KERNELS: Mapping[str, BlockKernel] = {
    "q8_0": of_blocks("q8_0", _q8_0, 32),
    "q4_0": of_blocks("q4_0", _q4_0, 32),
    "q4_1": of_blocks("q4_1", _q4_1, 32),
    "q5_0": of_blocks("q5_0", _q5_0, 32),
    "q5_1": of_blocks("q5_1", _q5_1, 32),
    "iq4_nl": of_blocks("iq4_nl", _iq4_nl, 32, table("iq4")),
    "mxfp4": of_blocks("mxfp4", _mxfp4, 32),
    "nvfp4": of_blocks("nvfp4", _nvfp4, 16),
}
