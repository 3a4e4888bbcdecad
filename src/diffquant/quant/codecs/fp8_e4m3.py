"""FP8 E4M3 ("fn"): sign, 4 exponent bits (bias 7), 3 fraction bits; no scale.

    largest finite 448 = 0x7E, smallest normal 2**-6, subnormal 2**-9, NaN 0x7F, no infinities

Rounds half to even. What rounds beyond 448 (|w| > 464) becomes NaN, never 448: a plain cast has
no scale to widen its range, and a clamped weight would be a silent error. torch casts the same
way where its header does not saturate; torch 2.13's does (torch/headeronly/util/Float8_e4m3fn.h:
448 for anything larger), and agrees everywhere else. Source: OCP 8-bit Floating Point
Specification 1.0, E4M3, non-saturating mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts

__all__ = ["E4M3_MAX", "decode", "e4m3_bits", "e4m3_table", "encode"]

E4M3_MAX = np.float32(448)
_NAN = np.uint32(0x7F)
_OVERFLOW = np.float32(464)  # half way from 448 to the next step; itself rounds to even, 448
_SMALLEST_NORMAL = np.float32(2.0**-6)
_SUBNORMAL_STEP = np.float32(2.0**-9)
_REBIAS = np.uint32((127 - 7) << 23)


def e4m3_table() -> Float32:
    """The 256 values in bit order; 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, fraction = code >> 3 & 15, code & 7
    size = np.where(
        exponent == 0,
        fraction * 2.0**-9,
        (8 + fraction) * np.exp2(exponent - 10.0),
    )
    size[code & 127 == 127] = np.nan
    return np.where(code > 127, -size, size).astype(np.float32)


_VALUES = e4m3_table()


def e4m3_bits(values: Float32) -> Bytes:
    """Round float32 to E4M3 bit patterns, half to even, overflow and NaN to NaN, sign kept."""
    size = np.abs(values)
    bits = size.view(np.uint32)
    odd = (bits >> np.uint32(20)) & np.uint32(1)
    with np.errstate(all="ignore"):
        normal = (bits + np.uint32(0x7FFFF) + odd - _REBIAS) >> np.uint32(20)
        subnormal = np.rint(np.where(size < _SMALLEST_NORMAL, size / _SUBNORMAL_STEP, 0))
    code = np.where(size < _SMALLEST_NORMAL, subnormal.astype(np.uint32), normal)
    code = np.where(size <= _OVERFLOW, code, _NAN)
    sign = values.view(np.uint32) >> np.uint32(24) & np.uint32(0x80)
    packed: Bytes = (code | sign).astype(np.uint8)
    return packed


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to E4M3.

    Args:
        weight: (R, K) float32, C-contiguous.
        stats: not used.
        fmt: not used.

    Returns:
        weight: (R, K) uint8, the bit patterns.

    Error: relative 2**-4 in the normal range, 2**-10 absolute below 2**-6; NaN beyond 464.
    """
    del stats, fmt
    return {"weight": e4m3_bits(weight)}


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
