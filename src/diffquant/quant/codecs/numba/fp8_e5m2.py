"""Fast twin of codecs/fp8_e5m2.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.fp8_e5m2 import e5m2_table
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import nearest_int

__all__ = ["decode", "e5m2_from_float", "encode", "look_up"]

_VALUES = e5m2_table()
_SMALLEST_NORMAL = np.float32(2.0**-14)
_SUBNORMAL_STEPS = np.float32(2.0**16)
_ROUND = np.uint32(0xFFFFF)
_REBIAS = np.uint32((127 - 15) << 23)
_INFINITY = np.uint32(0x7C)
_NOT_A_NUMBER = np.uint32(0x7F800000)  # bits above are NaN


@inlined
def e5m2_from_float(value: np.float32) -> np.uint8:
    """E5M2 bits, half to even, overflow to infinity, NaN 0x7F, sign kept."""
    size = abs(value)
    bits = np.float32(size).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(21)) & np.uint32(1))
    rounded = np.uint32(np.uint32(np.uint32(bits + _ROUND) + odd) - _REBIAS)
    normal = np.uint32(rounded >> np.uint32(21))
    normal = _INFINITY if normal > _INFINITY else normal
    subnormal = np.uint32(nearest_int(np.float32(size * _SUBNORMAL_STEPS)))
    code = subnormal if size < _SMALLEST_NORMAL else normal
    code = np.uint32(0x7F) if bits > _NOT_A_NUMBER else code
    sign = np.uint32(np.float32(value).view(np.uint32) >> np.uint32(24)) & np.uint32(0x80)
    return np.uint8(code | np.uint32(sign))


@kernel
def _encode_kernel(weight: Float32, packed: Bytes) -> None:
    for i in range(weight.size):
        packed[i] = e5m2_from_float(weight[i])


@kernel
def look_up(packed: Bytes, scale: np.float32, weight: Float32) -> None:
    """Write the values of E5M2 bit patterns times `scale`; all arrays flat."""
    for i in range(packed.size):
        weight[i] = _VALUES[packed[i]] * scale


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to E5M2; see codecs/fp8_e5m2.py."""
    del stats, fmt
    packed = np.empty(weight.shape, np.uint8)
    _encode_kernel(frozen(weight, -1), packed.reshape(-1))
    return {"weight": packed}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look bit patterns up, exact; see codecs/fp8_e5m2.py."""
    del fmt
    weight = np.empty(shape, np.float32)
    look_up(frozen(parts["weight"], weight.size), np.float32(1), weight.reshape(-1))
    return weight
