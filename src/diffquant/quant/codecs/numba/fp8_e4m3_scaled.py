"""Fast twin of codecs/fp8_e4m3_scaled.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.fp8_e4m3_scaled import scale_of
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits
from diffquant.quant.codecs.numba.fp8_e4m3 import e4m3_from_float, look_up

__all__ = ["decode", "encode", "reduce"]

_MAX = np.float32(448)


@kernel
def _amax_bits(weight: Float32) -> np.int32:
    amax = np.int32(0)
    for i in range(weight.size):
        size = magnitude_bits(weight[i])
        amax = size if size > amax else amax
    return amax


@kernel
def _encode_kernel(weight: Float32, inverse: np.float32, packed: Bytes) -> None:
    for i in range(weight.size):
        scaled = np.float32(weight[i] * inverse)
        scaled = _MAX if scaled > _MAX else scaled
        packed[i] = e4m3_from_float(-_MAX if scaled < -_MAX else scaled)


def reduce(weight: Float32, stats: float | None = None, *, fmt: str) -> float:
    """Fold a chunk into the largest magnitude so far; see codecs/fp8_scaled.py."""
    del fmt
    amax = np.array(_amax_bits(frozen(weight, -1)), np.int32).view(np.float32)
    return float(np.maximum(amax, np.float32(0 if stats is None else stats)))


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to E4M3 times the tensor's scale; see codecs/fp8_scaled.py."""
    scale = scale_of(reduce(weight, fmt=fmt) if stats is None else stats)
    packed = np.empty(weight.shape, np.uint8)
    with np.errstate(all="ignore"):
        inverse = np.float32(np.float32(1) / scale)
    _encode_kernel(frozen(weight, -1), inverse, packed.reshape(-1))
    return {"weight": packed, "scale": np.array(scale)}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply bit patterns' values by the scale; see codecs/fp8_scaled.py."""
    del fmt
    weight = np.empty(shape, np.float32)
    packed = frozen(parts["weight"], weight.size)
    look_up(packed, np.float32(parts["scale"]), weight.reshape(-1))
    return weight
