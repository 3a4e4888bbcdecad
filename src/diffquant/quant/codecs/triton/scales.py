"""Scales that are powers of two or 8-bit floats: their bits, as the CPU's codecs find them.

A format's exponent is the floor or the ceiling of a base-2 logarithm that was rounded to float32
first: near a power of two it counts as that power. A card's own logarithm is an approximation. But
where rounding decides, log2(2**n * (1 + d)) is n + d / ln 2 to five digits, no such sum lies nearer
to a tie than two digits tell, and a float32 sum of the two is rounded as the logarithm would be.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from diffquant.quant.codecs.triton.numbers import nearest_int

__all__ = ["ceil_log2", "e4m3_code", "e4m3_value", "floor_log2", "magnitude_bits"]

_PER_LN2 = tl.constexpr(2.0**-23 / math.log(2))  # log2 of one step above 1


@triton.jit
def magnitude_bits(value):
    """Bits of |value| as int32, ordered as the magnitudes are; NaN above infinity."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _parts(bits):
    """Exponent and 23 fraction bits of a finite magnitude above 0, subnormal ones too."""
    tiny = bits < 0x800000
    raised = (bits.to(tl.float32, bitcast=True) * 16777216.0).to(tl.int32, bitcast=True)  # 2**24
    bits = tl.where(tiny, raised, bits)
    return (bits >> 23) - tl.where(tiny, 151, 127), bits & 0x7FFFFF


@triton.jit
def floor_log2(bits):
    """Floor of log2, rounded to float32, of finite magnitudes above 0, given as bits: int32."""
    exponent, fraction = _parts(bits)
    above = (exponent + 1).to(tl.float32)
    short = (0x800000 - fraction).to(tl.float32) * (0.5 * _PER_LN2)
    return exponent + (above - short == above).to(tl.int32)


@triton.jit
def ceil_log2(bits):
    """Ceiling of log2, rounded to float32, of finite magnitudes above 0, given as bits: int32."""
    exponent, fraction = _parts(bits)
    below = exponent.to(tl.float32)
    return exponent + (below + fraction.to(tl.float32) * _PER_LN2 != below).to(tl.int32)


@triton.jit
def e4m3_code(size):
    """Round magnitudes to E4M3, half to even; beyond 464 and NaN to NaN: int32, 0 to 0x7F."""
    bits = size.to(tl.int32, bitcast=True)
    normal = (bits + (0x7FFFF - 0x3C000000) + (bits >> 20 & 1)) >> 20  # exponent less 120
    small = size < 0.015625  # the smallest normal, 2**-6
    code = tl.where(small, nearest_int(tl.where(small, size, 0.0) * 512.0), normal)
    return tl.where(size <= 464.0, code, 0x7F)


@triton.jit
def e4m3_value(code):
    """The magnitude of an E4M3 code, 0 to 0x7F, which is NaN."""
    value = (code << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120, exact
    return tl.where(code == 0x7F, float("nan"), value)
