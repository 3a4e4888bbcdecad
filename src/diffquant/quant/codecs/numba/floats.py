"""Bits of floats, in scalar functions that vectorise when a loop calls them.

Every intermediate integer is wrapped to 32 bits: numba widens mixed arithmetic to 64 bits, which
would halve the vector width. Reductions run on integer bits because a compiler may reorder those,
and may not reorder float ones.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.numba.compile import inlined

__all__ = [
    "float_from_half",
    "float_key",
    "half_from_float",
    "magnitude_bits",
    "nearest_int",
    "round_half_away",
    "select",
    "truncate",
]

_MAGIC = np.float32(12582912.0)
_MAGIC_MASK = np.int32(0x7FFFFF)
_MAGIC_ZERO = np.int32(0x400000)
_LIMIT = np.float32(2.0**31)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_ZERO = np.float32(0)
_HALF = np.float32(0.5)
_HALF_SUBNORMAL = np.float32(2.0**-24)  # spacing of float16 below 2**-14


@inlined
def magnitude_bits(value: np.float32) -> np.int32:
    """Bits of |value|, ordered as the magnitudes are; NaN above infinity."""
    return np.int32(np.float32(value).view(np.int32) & _MAGNITUDE)


@inlined
def float_key(value: np.float32) -> np.int32:
    """An integer ordered as floats are, -0 below +0; its own inverse on the bits."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & _MAGNITUDE))


@inlined
def nearest_int(value: np.float32) -> np.int32:
    """Round half to even for |value| < 2**22; beyond, ggml's wrapped bits."""
    bits = np.float32(value + _MAGIC).view(np.int32)
    return np.int32(np.int32(bits & _MAGIC_MASK) - _MAGIC_ZERO)


@inlined
def truncate(value: np.float32) -> np.int32:
    """Round toward zero; 0 for NaN and for what no int32 holds."""
    return np.int32(value if abs(value) < _LIMIT else _ZERO)


@inlined
def round_half_away(value: np.float32) -> np.int32:
    """C's roundf; 0 for NaN and for what no int32 holds."""
    held = value if abs(value) < _LIMIT else _ZERO
    whole = np.int32(held)
    rest = np.float32(held - np.float32(whole))  # exact
    return np.int32(whole + np.int32(rest >= _HALF) - np.int32(rest <= -_HALF))


@inlined
def select(mask: np.int32, chosen: np.float32, other: np.float32) -> np.float32:
    """Choose by a mask of -1 or 0, without a branch.

    The compiler merges several choices on one condition into a jump, and gives vectors up.
    """
    kept = np.int32(np.float32(chosen).view(np.int32) & mask)
    rest = np.int32(np.float32(other).view(np.int32) & np.int32(~mask))
    return np.int32(kept | rest).view(np.float32)


@inlined
def half_from_float(value: np.float32) -> np.uint16:
    """Float16 bits, half to even, subnormals exact, overflow to infinity, NaN to 0x7E00."""
    bits = np.uint32(np.float32(value).view(np.uint32))
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if size > np.uint32(0x7F800000):
        return np.uint16(0x7E00)
    if size >= np.uint32(0x47800000):  # 65536 and more
        return np.uint16(sign | np.uint32(0x7C00))
    if size < np.uint32(0x38800000):  # below 2**-14: count subnormal steps, exact scaling
        steps = nearest_int(np.float32(abs(value) / _HALF_SUBNORMAL))
        return np.uint16(sign | np.uint32(steps))
    odd = np.uint32((size >> np.uint32(13)) & np.uint32(1))
    rounded = np.uint32(size + np.uint32(0xFFF) + odd)
    return np.uint16(sign | np.uint32((rounded - np.uint32(0x38000000)) >> np.uint32(13)))


@inlined
def float_from_half(bits: np.uint16) -> np.float32:
    """Float16 bits to float32, exact, infinities and NaN kept."""
    wide = np.uint32(bits)
    sign = np.uint32((wide & np.uint32(0x8000)) << np.uint32(16))
    size = np.uint32(wide & np.uint32(0x7FFF))
    if size >= np.uint32(0x7C00):
        moved = np.uint32((size << np.uint32(13)) | np.uint32(0x7F800000))
    elif size >= np.uint32(0x400):
        moved = np.uint32((size << np.uint32(13)) + np.uint32(0x38000000))
    else:
        moved = np.uint32(np.float32(np.float32(size) * _HALF_SUBNORMAL).view(np.uint32))
    return np.uint32(sign | moved).view(np.float32)
