"""Device functions that differ from the package's: bytes of blocks, e4m3."""

from __future__ import annotations

import triton
import triton.language as tl

from diffquant.runtime.kernels.triton.bits import at

__all__ = ["e4m3", "weights"]


@triton.jit
def weights(src, first, mask, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """The WIDTH bytes from each even offset `first` (rows,) on: (rows, WIDTH) int32.

    GROUP 0: as words of 16 bits, for who writes no weights. Blocks rarely allow wider loads, and
    bytes are otherwise put together from such words, only to be taken apart again.
    """
    if GROUP == 0:
        start = (src + first).to(tl.pointer_type(tl.uint16), bitcast=True)
        both = tl.load(at(start, tl.arange(0, WIDTH // 2), 4), mask=mask[:, None], other=0)
        both = both.to(tl.int32)
        return tl.reshape(tl.join(both & 255, both >> 8), (first.shape[0], WIDTH))
    return tl.load(src + at(first, tl.arange(0, WIDTH), GROUP), mask=mask[:, None], other=0).to(
        tl.int32
    )


@triton.jit
def e4m3(code):
    """Float8 e4m3fn from its bits, int32: float32, exact; 0x7F and 0xFF are NaN."""
    # Exponent and fraction in float32's place are 2**120 too small, subnormals included. The sign
    # goes there by a shift that spreads it.
    bits = code << 24 >> 4 & -2014314496  # 0x87F00000
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(tl.abs(value) == 480.0, float("nan"), value)
