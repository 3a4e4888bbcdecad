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
def _halves(src, first, mask, GROUP: tl.constexpr, NBYTES: tl.constexpr):
    """Nibbles of NBYTES bytes: all low ones, all high ones; each (units, NBYTES) int32."""
    packed = weights(src, first, mask, NBYTES, GROUP)
    return packed & 15, packed >> 4


@triton.jit
def _fifths(src, first, mask):
    """The bits of a uint32 per unit, as fifth bits of both halves: each (units, 16) int32."""
    column = tl.arange(0, 16)[None, :]
    low, high = word(src, first, mask)[:, None], word(src, first + 2, mask)[:, None]
    return (low >> column & 1) << 4, (high >> column & 1) << 4


@triton.jit
def _q8_0(src, block, sub, mask, table, GROUP: tl.constexpr):
    q = int8(weights(src, block + 2, mask, 32, GROUP))
    return (q * half(src, block, mask)[:, None],)


@triton.jit
def _q4_0(src, block, sub, mask, table, GROUP: tl.constexpr):
    low, high = _halves(src, block + 2, mask, GROUP, 16)
    scale = half(src, block, mask)[:, None]
    return number(low, 8) * scale, number(high, 8) * scale


@triton.jit
def _q4_1(src, block, sub, mask, table, GROUP: tl.constexpr):
    low, high = _halves(src, block + 4, mask, GROUP, 16)
    scale, minimum = half(src, block, mask)[:, None], half(src, block + 2, mask)[:, None]
    return number(low, 0) * scale + minimum, number(high, 0) * scale + minimum


@triton.jit
def _q5_0(src, block, sub, mask, table, GROUP: tl.constexpr):
    low, high = _halves(src, block + 6, mask, GROUP, 16)
    fifth, fifth_high = _fifths(src, block + 2, mask)
    scale = half(src, block, mask)[:, None]
    return number(low | fifth, 16) * scale, number(high | fifth_high, 16) * scale


@triton.jit
def _q5_1(src, block, sub, mask, table, GROUP: tl.constexpr):
    low, high = _halves(src, block + 8, mask, GROUP, 16)
    fifth, fifth_high = _fifths(src, block + 4, mask)
    scale, minimum = half(src, block, mask)[:, None], half(src, block + 2, mask)[:, None]
    low, high = number(low | fifth, 0), number(high | fifth_high, 0)
    return low * scale + minimum, high * scale + minimum


@triton.jit
def _iq4_nl(src, block, sub, mask, table, GROUP: tl.constexpr):
    low, high = _halves(src, block + 2, mask, GROUP, 16)
    scale = half(src, block, mask)[:, None]
    return scale * tl.load(table + low), scale * tl.load(table + high)


@triton.jit
def _mxfp4(src, block, sub, mask, table, GROUP: tl.constexpr):
    # Doubled integers, and code 8 is +0; the scale is halved: 2 ** (exponent - 128).
    place = (block + 1)[:, None] + tl.arange(0, 16)[None, :]  # blocks of 17 bytes
    packed = tl.load(src + place, mask=mask[:, None], other=0).to(tl.int32)
    low, high = packed & 15, packed >> 4
    exponent = byte(src, block, mask)
    small = 0x00200000 << (exponent & 1)  # the two subnormal ones
    bits = tl.where(exponent < 2, small, (exponent - 1) << 23)
    scale = bits.to(tl.float32, bitcast=True)[:, None]
    return scale * (e2m1(low) * 2.0 + 0.0), scale * (e2m1(high) * 2.0 + 0.0)


@triton.jit
def _nvfp4(src, block, sub, mask, table, GROUP: tl.constexpr):
    low, high = _halves(src, block + 4 + sub * 8, mask, GROUP, 8)
    code = byte(src, block + sub, mask)
    # Half of an unsigned e4m3: 2**119; its NaN counts as 0, if the sign bit is not set.
    scale = ((code & 127) << 20).to(tl.float32, bitcast=True) * 6.64613997892458e35
    scale = tl.where(code == 127, 0.0, scale)[:, None]
    return scale * (e2m1(low) * 2.0 + 0.0), scale * (e2m1(high) * 2.0 + 0.0)


KERNELS: Mapping[str, BlockKernel] = {
    "q8_0": of_blocks("q8_0", _q8_0, 32),
    "q4_0": of_blocks("q4_0", _q4_0, 16, planes=2),
    "q4_1": of_blocks("q4_1", _q4_1, 16, planes=2),
    "q5_0": of_blocks("q5_0", _q5_0, 16, planes=2),
    "q5_1": of_blocks("q5_1", _q5_1, 16, planes=2),
    "iq4_nl": of_blocks("iq4_nl", _iq4_nl, 16, table("iq4"), planes=2),
    "mxfp4": of_blocks("mxfp4", _mxfp4, 16, planes=2),
    "nvfp4": of_blocks("nvfp4", _nvfp4, 8, planes=2),
}
