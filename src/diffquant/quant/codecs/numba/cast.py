"""Fast twin of codecs/cast.py: one loop over the elements instead of several passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs import cast
from diffquant.quant.codecs.arrays import Float32, Parts, frozen
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.floats import float_from_half, half_from_float

__all__ = ["NARROW", "decode", "encode"]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_QUIET = np.uint32(0x7FC0)
_HALF = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_SHIFT = np.uint32(16)


@kernel
def _narrow_bf16(weight: Float32, out: NDArray[np.uint16]) -> None:
    for i in range(weight.size):
        word = np.float32(weight[i]).view(np.uint32)
        odd = np.uint32(np.uint32(word >> _SHIFT) & _ONE)
        rounded = np.uint32(np.uint32(np.uint32(word + _HALF) + odd) >> _SHIFT)
        out[i] = np.uint16(_QUIET if np.uint32(word & _MAGNITUDE) > _INFINITY else rounded)


@kernel
def _widen_bf16(stored: NDArray[np.uint16], out: Float32) -> None:
    for i in range(stored.size):
        out[i] = np.uint32(np.uint32(stored[i]) << _SHIFT).view(np.float32)


@kernel
def _narrow_f16(weight: Float32, out: NDArray[np.uint16]) -> None:
    for i in range(weight.size):
        out[i] = half_from_float(weight[i])


@kernel
def _widen_f16(stored: NDArray[np.uint16], out: Float32) -> None:
    for i in range(stored.size):
        out[i] = float_from_half(stored[i])


# By format: float32 (n,) rounded into uint16 (n,), half to even.
NARROW = {"bf16": _narrow_bf16, "f16": _narrow_f16}
_WIDEN = {"bf16": _widen_bf16, "f16": _widen_f16}
_STORED = {"bf16": np.uint16, "f16": np.float16}


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to a floating point dtype; see codecs/cast.py."""
    if fmt == "f32":
        return cast.encode(weight, stats, fmt=fmt)
    out = np.empty(weight.shape, np.uint16)
    NARROW[fmt](frozen(weight, -1), out.reshape(-1))
    return {"weight": out.view(_STORED[fmt])}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Widen rows to float32, exact; see codecs/cast.py."""
    if fmt == "f32":
        return cast.decode(parts, shape, fmt=fmt)
    out = np.empty(shape, np.float32)
    _WIDEN[fmt](frozen(parts["weight"], out.size).view(np.uint16), out.reshape(-1))
    return out
