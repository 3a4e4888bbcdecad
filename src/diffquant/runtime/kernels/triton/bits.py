"""Device functions that every decoder shares: bytes, float16, 8-bit floats, small integers.

8-bit floats are put together from their bits, alike on cards with and without them. Small integers
become floats the same way: the conversion unit of a card does a quarter of what its adders do.

In a tile (rows, columns) a row is a run of weights with one scale and a column is a weight. A scale
is read once per row. Weights are read in groups as wide as what a thread writes at once: `GROUP`,
16 bytes of results. Left alone the compiler would read in wider groups than it writes, and carry
every weight through shared memory in between.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "at",
    "byte",
    "e2m1",
    "e4m3",
    "e5m2",
    "even_signs",
    "half",
    "int8",
    "number",
    "to_e4m3",
    "weights",
    "word",
]


@triton.jit
def byte(src, offset, mask):
    """One byte for every row: (rows,) int32."""
    return tl.load(src + offset, mask=mask, other=0).to(tl.int32)


@triton.jit
def number(small, OFFSET: tl.constexpr):
    """Integers 0 to 2**23 - 1, less OFFSET, as float32, exact."""
    # As the fraction of a float between 2**23 and 2**24 an integer is worth itself.
    return (small | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)


@triton.jit
def int8(value):
    """Bytes 0 to 255 read as two's complement: float32."""
    return number(value ^ 128, 128)


@triton.jit
def half(src, offset, mask):
    """The float16 at the even `offset` of every row: (rows,) float32."""
    place = (src + offset).to(tl.pointer_type(tl.float16), bitcast=True)
    return tl.load(place, mask=mask, other=0).to(tl.float32)


@triton.jit
def word(src, offset, mask):
    """The little-endian uint16 at the even `offset` of every row: (rows,) int32."""
    place = (src + offset).to(tl.pointer_type(tl.uint16), bitcast=True)
    return tl.load(place, mask=mask, other=0).to(tl.int32)


@triton.jit
def at(first, column, GROUP: tl.constexpr):
    """Offsets `first` (rows,) + `column` (columns,), to be read in groups of GROUP."""
    return tl.max_contiguous(first[:, None] + column[None, :], [1, GROUP])


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


@triton.jit
def to_e4m3(x):
    """Bits of the nearest float8 e4m3fn, ties to even: uint8; for |x| <= 448, and NaN."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - 960  # 120 less in the exponent
    # Below 2**-6 steps are 2**-9: what float32 rounds to beside 2**14.
    beside = size.to(tl.float32, bitcast=True) + 16384.0
    small = beside.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | bits >> 24 & 0x80).to(tl.uint8)


@triton.jit
def e5m2(code):
    """Float8 e5m2 from its bits, int32: float32, exact; it is the upper byte of a float16."""
    return (code << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e2m1(code):
    """Float4 e2m1 from its bits, int32: float32, exact; code 8 is -0."""
    bits = (code & 8) << 28 | (code & 7) << 22  # 2**126 too small
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def even_signs(seven):
    """Eight signs of seven stored bits, int32: bit 7 makes the count of minus signs even."""
    parity = seven ^ seven >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return seven | (parity & 1) << 7
