"""Fast twin of codecs/int8_tensor.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts, frozen
from diffquant.quant.codecs.int8_tensor import scale_of
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.floats import nearest_int
from diffquant.quant.codecs.numba.fp8_e4m3_scaled import reduce

__all__ = ["decode", "encode", "reduce"]


@kernel
def _encode_kernel(weight: Float32, scale: np.float32, level: NDArray[np.int8]) -> None:
    # A quotient is at most 127 and a rounding, or NaN, whose bits nearest_int reads as 0.
    for i in range(weight.size):
        level[i] = np.int8(nearest_int(np.float32(weight[i] / scale)))


@kernel
def _decode_kernel(level: NDArray[np.int8], scale: np.float32, weight: Float32) -> None:
    for i in range(level.size):
        weight[i] = np.float32(level[i]) * scale


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize rows to int8 with the tensor's scale; see codecs/int8_tensor.py."""
    scale = scale_of(reduce(weight, fmt=fmt) if stats is None else stats)
    level = np.empty(weight.shape, np.int8)
    _encode_kernel(frozen(weight, -1), scale, level.reshape(-1))
    return {"weight": level, "scale": np.array(scale)}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by the scale; see codecs/int8_tensor.py."""
    del fmt
    weight = np.empty(shape, np.float32)
    level = frozen(parts["weight"], weight.size)
    _decode_kernel(level, np.float32(parts["scale"]), weight.reshape(-1))
    return weight
