"""Fast twin of codecs/blocks_128.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.blocks_128 import BLOCK_SIZE, block_counts, block_scales
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits, nearest_int
from diffquant.quant.codecs.numba.fp8_e4m3 import e4m3_from_float

__all__ = ["decode", "encode"]

_MAX = np.float32(448)
_VALUES = e4m3_table()


@kernel
def _amax_kernel(weight: Float32, amax: Float32) -> None:
    for r in range(weight.shape[0]):
        for c in range(amax.shape[1]):
            bits = np.int32(0)
            for i in range(BLOCK_SIZE):
                size = magnitude_bits(weight[r, c * BLOCK_SIZE + i])
                bits = size if size > bits else bits
            most = magnitude_bits(amax[r // BLOCK_SIZE, c])
            bits = most if most > bits else bits
            amax[r // BLOCK_SIZE, c] = np.int32(bits).view(np.float32)


@kernel
def _fp8_kernel(weight: Float32, inverse: Float32, packed: Bytes) -> None:
    for r in range(weight.shape[0]):
        for c in range(inverse.shape[1]):
            by = inverse[r // BLOCK_SIZE, c]
            for i in range(c * BLOCK_SIZE, (c + 1) * BLOCK_SIZE):
                scaled = np.float32(weight[r, i] * by)
                scaled = _MAX if scaled > _MAX else scaled
                packed[r, i] = e4m3_from_float(-_MAX if scaled < -_MAX else scaled)


@kernel
def _int8_kernel(weight: Float32, scale: Float32, level: NDArray[np.int8]) -> None:
    # A quotient is at most 127 and a rounding, or NaN, whose bits nearest_int reads as 0.
    for r in range(weight.shape[0]):
        for c in range(scale.shape[1]):
            by = scale[r // BLOCK_SIZE, c]
            for i in range(c * BLOCK_SIZE, (c + 1) * BLOCK_SIZE):
                level[r, i] = np.int8(nearest_int(np.float32(weight[r, i] / by)))


@kernel
def _decode_fp8_kernel(packed: Bytes, scale: Float32, weight: Float32) -> None:
    for r in range(weight.shape[0]):
        for c in range(scale.shape[1]):
            by = scale[r // BLOCK_SIZE, c]
            for i in range(c * BLOCK_SIZE, (c + 1) * BLOCK_SIZE):
                weight[r, i] = _VALUES[packed[r, i]] * by


@kernel
def _decode_int8_kernel(level: NDArray[np.int8], scale: Float32, weight: Float32) -> None:
    for r in range(weight.shape[0]):
        for c in range(scale.shape[1]):
            by = scale[r // BLOCK_SIZE, c]
            for i in range(c * BLOCK_SIZE, (c + 1) * BLOCK_SIZE):
                weight[r, i] = np.float32(level[r, i]) * by


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round blocks with their own scale; see codecs/blocks_128.py."""
    del stats
    amax = np.zeros(block_counts(weight.shape), np.float32)
    whole = frozen(weight, weight.shape)
    _amax_kernel(whole, amax)
    scale = block_scales(amax, fmt)
    if fmt.startswith("fp8"):
        packed = np.empty(weight.shape, np.uint8)
        with np.errstate(all="ignore"):
            inverse = np.float32(1) / scale
        _fp8_kernel(whole, frozen(inverse, inverse.shape), packed)
        return {"weight": packed, "block_scale": scale}
    level = np.empty(weight.shape, np.int8)
    _int8_kernel(whole, frozen(scale, scale.shape), level)
    return {"weight": level, "block_scale": scale}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply numbers by their block's scale; see codecs/blocks_128.py."""
    weight = np.empty(shape, np.float32)
    scale = frozen(parts["block_scale"], block_counts(shape))
    kernel_of = _decode_fp8_kernel if fmt.startswith("fp8") else _decode_int8_kernel
    kernel_of(frozen(parts["weight"], shape), scale, weight)
    return weight
