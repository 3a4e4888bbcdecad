"""ggml's ternary formats, levels -1, 0 and 1; layouts as in quant/codecs/tq1_0.py and tq2_0.py."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from diffquant.runtime.kernels.fields import Kernel
from diffquant.runtime.kernels.triton.bits import half, number, weights
from diffquant.runtime.kernels.triton.blocks import of_blocks

__all__ = ["KERNELS"]


@triton.jit
def _tq1_0(src, block, sub, mask, table, GROUP: tl.constexpr):
    # Runs of 16: ten of five digits of bytes 0-31, five of bytes 32-47, one of four of bytes 48-51.
    column = tl.arange(0, 16)
    last = (sub == 15)[:, None]
    start = tl.where(sub < 10, sub % 2 * 16, tl.where(sub < 15, 32, 48))
    digit = tl.where(sub < 10, sub // 2, sub - 10)[:, None]
    digit = tl.where(last, (column // 4)[None, :], digit)
    offset = (block + start)[:, None] + tl.where(last, (column % 4)[None, :], column[None, :])
    fraction = tl.load(src + offset, mask=mask[:, None], other=0).to(tl.int32)
    # Times 3 ** digit: 3 for the digit's bit 0, 9 for bit 1, 81 for bit 2.
    fraction *= tl.where((digit & 1) != 0, 3, 1) * tl.where((digit & 2) != 0, 9, 1)
    fraction = fraction * tl.where((digit & 4) != 0, 81, 1) & 255
    return (half(src, block + 52, mask)[:, None] * number(fraction * 3 >> 8, 1),)


@triton.jit
def _tq2_0(src, block, sub, mask, table, GROUP: tl.constexpr):
    packed = weights(src, block + sub // 4 * 32, mask, 32, GROUP)
    level = packed >> (sub % 4 * 2)[:, None] & 3
    return (half(src, block + 64, mask)[:, None] * number(level, 1),)


KERNELS: Mapping[str, Kernel] = {
    "tq1_0": of_blocks("tq1_0", _tq1_0, 16),
    "tq2_0": of_blocks("tq2_0", _tq2_0, 32),
}
