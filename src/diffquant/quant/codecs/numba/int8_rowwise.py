"""Fast twin of codecs/int8_rowwise.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts, frozen
from diffquant.quant.codecs.int8_rowwise import SMALLEST_SCALE
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits, nearest_int

__all__ = ["decode", "encode"]

_LEVELS = np.float32(127)


@kernel
def _encode_kernel(weight: Float32, level: NDArray[np.int8], scale: Float32) -> None:
    for r in range(weight.shape[0]):
        bits = np.int32(0)
        for k in range(weight.shape[1]):
            size = magnitude_bits(weight[r, k])
            bits = size if size > bits else bits
        step = np.float32(np.int32(bits).view(np.float32) / _LEVELS)
        step = SMALLEST_SCALE if step < SMALLEST_SCALE else step
        scale[r, 0] = step
        # A quotient is at most 127 and a rounding, or NaN, whose bits nearest_int reads as 0.
        for k in range(weight.shape[1]):
            level[r, k] = np.int8(nearest_int(np.float32(weight[r, k] / step)))


@kernel
def _decode_kernel(level: NDArray[np.int8], scale: Float32, weight: Float32) -> None:
    for r in range(level.shape[0]):
        for k in range(level.shape[1]):
            weight[r, k] = np.float32(level[r, k]) * scale[r, 0]


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize each row to int8; see codecs/int8_rowwise.py."""
    del stats, fmt
    level = np.empty(weight.shape, np.int8)
    scale = np.empty((len(weight), 1), np.float32)
    _encode_kernel(frozen(weight, weight.shape), level, scale)
    return {"weight": level, "scale": scale}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by their row's scale; see codecs/int8_rowwise.py."""
    del fmt
    weight = np.empty(shape, np.float32)
    scale = frozen(parts["scale"], (shape[0], 1))
    _decode_kernel(frozen(parts["weight"], shape), scale, weight)
    return weight
