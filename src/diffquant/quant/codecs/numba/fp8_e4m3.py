"""Fast twin of codecs/fp8_e4m3.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import nearest_int

__all__ = ["decode", "e4m3_from_float", "encode", "look_up"]

_VALUES = e4m3_table()
_OVERFLOW = np.float32(464)
_SMALLEST_NORMAL = np.float32(2.0**-6)
_SUBNORMAL_STEPS = np.float32(2.0**9)  # per unit; the product is exact
_ROUND = np.uint32(0x7FFFF)
_REBIAS = np.uint32((127 - 7) << 23)


@inlined
def e4m3_from_float(value: np.float32) -> np.uint8:
    """E4M3 bits, half to even, overflow and NaN to NaN, sign kept."""
    size = abs(value)
    bits = np.float32(size).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(20)) & np.uint32(1))
    rounded = np.uint32(np.uint32(np.uint32(bits + _ROUND) + odd) - _REBIAS)
    normal = np.uint32(rounded >> np.uint32(20))
    subnormal = np.uint32(nearest_int(np.float32(size * _SUBNORMAL_STEPS)))
    code = subnormal if size < _SMALLEST_NORMAL else normal
    code = code if size <= _OVERFLOW else np.uint32(0x7F)
    sign = np.uint32(np.float32(value).view(np.uint32) >> np.uint32(24)) & np.uint32(0x80)
    return np.uint8(code | np.uint32(sign))


@kernel
def _encode_kernel(weight: Float32, packed: Bytes) -> None:
    for i in range(weight.size):
        packed[i] = e4m3_from_float(weight[i])


@kernel
def look_up(packed: Bytes, scale: np.float32, weight: Float32) -> None:
    """Write the values of E4M3 bit patterns times `scale`; all arrays flat."""
    for i in range(packed.size):
        weight[i] = _VALUES[packed[i]] * scale


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to E4M3; see codecs/fp8_e4m3.py."""
    del stats, fmt
    packed = np.empty(weight.shape, np.uint8)
    _encode_kernel(frozen(weight, -1), packed.reshape(-1))
    return {"weight": packed}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look bit patterns up, exact; see codecs/fp8_e4m3.py."""
    del fmt
    weight = np.empty(shape, np.float32)
    look_up(frozen(parts["weight"], weight.size), np.float32(1), weight.reshape(-1))
    return weight
