"""FP8 E5M2: the upper byte of a float16: sign, 5 exponent bits (bias 15), 2 fraction bits.

    largest finite 57344 = 0x7B, infinity 0x7C, smallest normal 2**-14, subnormal 2**-16

Rounds float32 half to even in one step (by way of float16 it would round twice); 61440 and more
become infinity, NaN 0x7F. Source: OCP 8-bit Floating Point Specification 1.0, E5M2, non-saturating
mode; torch casts the same way where its header does not saturate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts

__all__ = ["E5M2_MAX", "decode", "e5m2_bits", "e5m2_table", "encode"]

E5M2_MAX = np.float32(57344)
_INFINITY, _NAN = np.uint32(0x7C), np.uint32(0x7F)
_SMALLEST_NORMAL = np.float32(2.0**-14)
_SUBNORMAL_STEPS = np.float32(2.0**16)  # per unit; the product is exact
_REBIAS = np.uint32((127 - 15) << 23)


def e5m2_table() -> Float32:
    """The 256 values in bit order."""
    halves = (np.arange(256, dtype=np.uint16) << np.uint16(8)).view(np.float16)
    return halves.astype(np.float32)


_VALUES = e5m2_table()


def e5m2_bits(values: Float32) -> Bytes:
    """Round float32 to E5M2 bit patterns, half to even, overflow to infinity, sign kept."""
    size = np.abs(values)
    bits = size.view(np.uint32)
    odd = (bits >> np.uint32(21)) & np.uint32(1)
    small = size < _SMALLEST_NORMAL
    with np.errstate(all="ignore"):
        normal = (bits + np.uint32(0xFFFFF) + odd - _REBIAS) >> np.uint32(21)
        subnormal = np.rint(np.where(small, size * _SUBNORMAL_STEPS, 0)).astype(np.uint32)
    code = np.where(small, subnormal, np.minimum(normal, _INFINITY))
    code = np.where(np.isnan(values), _NAN, code)
    sign = values.view(np.uint32) >> np.uint32(24) & np.uint32(0x80)
    packed: Bytes = (code | sign).astype(np.uint8)
    return packed


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to E5M2.

    Args:
        weight: (R, K) float32, C-contiguous.
        stats: not used.
        fmt: not used.

    Returns:
        weight: (R, K) uint8, the bit patterns.

    Error: relative 2**-3 in the normal range, 2**-17 absolute below 2**-14; infinite from 61440.
    """
    del stats, fmt
    return {"weight": e5m2_bits(weight)}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look bit patterns up, exact.

    Args:
        parts: weight: (R, K) uint8.
        shape: (R, K).
        fmt: not used.
    """
    del fmt
    weight: Float32 = _VALUES[parts["weight"]].reshape(shape)
    return weight
