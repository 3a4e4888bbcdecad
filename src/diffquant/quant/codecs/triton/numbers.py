"""Device functions that every encoder shares: elements of lanes, rounding, packed bytes.

A lane is a sub-block: its elements are a tuple of vectors, element i of every lane side by side, so
that sums over them are written out in the CPU's order and nothing is reduced across lanes. On a
card each stays in a register of the lane's thread. Neighbouring threads read elements a sub-block
apart; the lines they open serve the elements that follow from the nearest cache.

What makes bytes equal to the CPU's: `tl.div_rn` and `tl.sqrt_rn`, since a plain division is an
approximation on a card (which the interpreter does not show), no fused multiply-add (launch.py), no
flush to zero (tests read the compiled code for all three), and no NaN that becomes an integer: a
card's NaN has other bits than a processor's. Where the CPU's search can meet one, `usable` keeps it
away.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "elements",
    "fifth_bits",
    "inverse",
    "nearest_int",
    "nibbles",
    "round_half_away",
    "store_bytes",
    "store_half",
    "truncate",
    "usable",
]


@triton.jit
def elements(src, lane, mask, SIZE: tl.constexpr):
    """Elements of every lane's sub-block: SIZE vectors (lanes,) of float32, 0 outside the mask."""
    found = ()
    for i in tl.static_range(SIZE):
        value = tl.load(src + lane * SIZE + i, mask=mask, other=0.0)
        found = found + (value.to(tl.float32),)
    return found


@triton.jit
def nearest_int(value):
    """Round half to even for magnitudes below 2**22; beyond, ggml's wrapped bits: int32.

    NaN is 0, as a processor's own NaN comes out of ggml's bits; a card's would be 2**22 - 1.
    """
    value = tl.where(value == value, value, 0.0)
    return ((value + 12582912.0).to(tl.int32, bitcast=True) & 0x7FFFFF) - 0x400000


@triton.jit
def truncate(value):
    """Round toward zero; 0 for NaN and for what no int32 holds."""
    return tl.where(tl.abs(value) < 2147483648.0, value, 0.0).to(tl.int32)


@triton.jit
def round_half_away(value):
    """C's roundf; 0 for NaN and for what no int32 holds."""
    held = tl.where(tl.abs(value) < 2147483648.0, value, 0.0)
    whole = held.to(tl.int32)
    rest = held - whole.to(tl.float32)  # exact
    return whole + (rest >= 0.5).to(tl.int32) - (rest <= -0.5).to(tl.int32)


@triton.jit
def inverse(scale):
    """1 / scale, and 0 where the scale is 0."""
    return tl.where(scale != 0.0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), 0.0)


@triton.jit
def usable(factor):
    """A factor of numbers that are rounded by `nearest_int` and cut to 0 and more.

    An infinite one makes infinities and NaN, which on the CPU all become 0; so does 0 here.
    """
    return tl.where(tl.abs(factor) < float("inf"), factor, 0.0)


@triton.jit
def store_half(dst, offset, value, mask):
    """Write float16, half to even, at the even `offset` of every lane; returns what was stored."""
    half = value.to(tl.float16)
    tl.store((dst + offset).to(tl.pointer_type(tl.float16), bitcast=True), half, mask=mask)
    return half.to(tl.float32)


@triton.jit
def store_bytes(dst, offset, values, mask, TYPE: tl.constexpr, WIDTH: tl.constexpr):
    """Write a tuple of bytes, int32 0 to 255 each, one after another from `offset` on.

    Args:
        dst: where the blocks begin.
        offset: of every lane, a multiple of WIDTH.
        values: as many vectors as bytes, a multiple of WIDTH.
        mask: lanes that exist.
        TYPE: integer of WIDTH bytes, in which they are written.
        WIDTH: 1, 2 or 4.
    """
    for first in tl.static_range(0, len(values), WIDTH):
        word = values[first]
        for i in tl.static_range(1, WIDTH):
            word = word | values[first + i] << (8 * i)
        place = (dst + (offset + first)).to(tl.pointer_type(TYPE), bitcast=True)
        tl.store(place, word.to(TYPE), mask=mask)


@triton.jit
def nibbles(levels):
    """Blocks of 32: levels j and j + 16 in byte j, as a tuple of 16."""
    found = ()
    for j in tl.static_range(16):
        both = (levels[j] & 15) | (levels[j + 16] & 15) << 4
        found = found + (both,)
    return found


@triton.jit
def fifth_bits(levels):
    """Bit 4 of 32 levels as four bytes: the lowest bits belong to the first ones."""
    found = ()
    for at in tl.static_range(0, 32, 8):
        byte = levels[at] >> 4 & 1
        for i in tl.static_range(1, 8):
            byte = byte | (levels[at + i] >> 4 & 1) << i
        found = found + (byte,)
    return found
