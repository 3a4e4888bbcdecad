"""Fast twin of codecs/int8_bnb.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts, frozen
from diffquant.quant.codecs.int8_bnb import ONE_LEVEL
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits, nearest_int

__all__ = ["decode", "encode"]

_ONE, _LEVELS = np.float32(1), np.float32(127)
_SMALLEST = np.float32(2.0**-121)  # below it the factor is infinite, or nearly


@kernel
def _encode_kernel(weight: Float32, level: NDArray[np.int8], absmax: Float32) -> None:
    for r in range(weight.shape[0]):
        bits = np.int32(0)
        for k in range(weight.shape[1]):
            size = magnitude_bits(weight[r, k])
            bits = size if size > bits else bits
        amax = np.int32(bits).view(np.float32)
        absmax[r] = amax
        if amax > _SMALLEST:
            inverse = np.float32(np.float32(_ONE / amax) * _LEVELS)
            for k in range(weight.shape[1]):
                level[r, k] = np.int8(nearest_int(np.float32(weight[r, k] * inverse)))
        else:
            level[r] = 0


@kernel
def _decode_kernel(level: NDArray[np.int8], absmax: Float32, weight: Float32) -> None:
    for r in range(level.shape[0]):
        for k in range(level.shape[1]):
            weight[r, k] = np.float32(np.float32(level[r, k]) * absmax[r]) * ONE_LEVEL


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize each row to int8; see codecs/int8_bnb.py."""
    del stats, fmt
    level = np.empty(weight.shape, np.int8)
    absmax = np.empty(len(weight), np.float32)
    _encode_kernel(frozen(weight, weight.shape), level, absmax)
    return {"weight": level, "scb": absmax}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by their row's absmax and by 1 / 127; see codecs/int8_bnb.py."""
    del fmt
    weight = np.empty(shape, np.float32)
    _decode_kernel(frozen(parts["weight"], shape), frozen(parts["scb"], shape[0]), weight)
    return weight
