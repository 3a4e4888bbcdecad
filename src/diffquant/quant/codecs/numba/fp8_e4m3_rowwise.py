"""Fast twin of codecs/fp8_e4m3_rowwise.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.fp8_e4m3 import E4M3_MAX, e4m3_table
from diffquant.quant.codecs.fp8_scaled import scales_for
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits
from diffquant.quant.codecs.numba.fp8_e4m3 import e4m3_from_float

__all__ = ["decode", "encode"]

_MAX = np.float32(448)
_VALUES = e4m3_table()


@kernel
def _amax_kernel(weight: Float32, amax: Float32) -> None:
    for r in range(weight.shape[0]):
        bits = np.int32(0)
        for k in range(weight.shape[1]):
            size = magnitude_bits(weight[r, k])
            bits = size if size > bits else bits
        amax[r] = np.int32(bits).view(np.float32)


@kernel
def _encode_kernel(weight: Float32, inverse: Float32, packed: Bytes) -> None:
    for r in range(weight.shape[0]):
        by = inverse[r]
        for k in range(weight.shape[1]):
            scaled = np.float32(weight[r, k] * by)
            scaled = _MAX if scaled > _MAX else scaled
            packed[r, k] = e4m3_from_float(-_MAX if scaled < -_MAX else scaled)


@kernel
def _decode_kernel(packed: Bytes, scale: Float32, weight: Float32) -> None:
    for r in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            weight[r, k] = _VALUES[packed[r, k]] * scale[r]


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to E4M3 times their own scale; see codecs/fp8_e4m3_rowwise.py."""
    del stats, fmt
    whole = frozen(weight, weight.shape)
    amax = np.empty(len(weight), np.float32)
    _amax_kernel(whole, amax)
    with np.errstate(all="ignore"):
        scale = scales_for(amax, E4M3_MAX)
        inverse = np.float32(1) / scale
    packed = np.empty(weight.shape, np.uint8)
    _encode_kernel(whole, frozen(inverse, inverse.shape), packed)
    return {"weight": packed, "scale": scale}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply values by their row's scale; see codecs/fp8_e4m3_rowwise.py."""
    del fmt
    weight = np.empty(shape, np.float32)
    _decode_kernel(frozen(parts["weight"], shape), frozen(parts["scale"], shape[0]), weight)
    return weight
