"""Fast twin of codecs/nvfp4_comfy.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits
from diffquant.quant.codecs.numba.fp8_e4m3 import e4m3_from_float
from diffquant.quant.codecs.numba.fp8_e4m3_scaled import reduce
from diffquant.quant.codecs.nvfp4_comfy import BLOCK_SIZE, MIDPOINTS, PAD, VALUES, scale_of
from diffquant.quant.codecs.swizzle import rounded_up, swizzle, unswizzle

__all__ = ["decode", "encode", "reduce"]

_LARGEST = np.float32(6)
_E4M3_MAX = np.float32(448)
_ZERO = np.float32(0)
_SCALES = e4m3_table()
_VALUES = VALUES
_B0, _B1, _B2, _B3, _B4, _B5, _B6 = MIDPOINTS


@inlined
def _level(value: np.float32, scale: np.float32) -> np.uint8:
    # A tie goes to the even code; NaN lies above all bounds. What exceeds 6 needs no clamp.
    scaled = np.float32(value / scale)
    size = np.float32(abs(scaled))
    level = np.int32(np.int32(not size <= _B0) + np.int32(not size < _B1))
    level = np.int32(level + np.int32(not size <= _B2) + np.int32(not size < _B3))
    level = np.int32(level + np.int32(not size <= _B4) + np.int32(not size < _B5))
    level = np.int32(level + np.int32(not size <= _B6))
    sign = np.int32(np.int32(np.float32(scaled).view(np.int32) >> np.int32(28)) & np.int32(8))
    return np.uint8(level | sign)


@kernel
def _encode_kernel(weight: Float32, whole_scale: np.float32, packed: Bytes, byte: Bytes) -> None:
    for r in range(weight.shape[0]):
        for c in range(byte.shape[1]):
            start = c * BLOCK_SIZE
            stop = min(start + BLOCK_SIZE, weight.shape[1])
            bits = np.int32(0)
            for k in range(start, stop):
                size = magnitude_bits(weight[r, k])
                bits = size if size > bits else bits
            amax = np.int32(bits).view(np.float32)
            wanted = np.float32(np.float32(amax / _LARGEST) / whole_scale)
            byte[r, c] = e4m3_from_float(_E4M3_MAX if wanted > _E4M3_MAX else wanted)
            scale = np.float32(whole_scale * _SCALES[byte[r, c]])
            if scale == _ZERO:
                continue
            for i in range(start // 2, stop // 2):
                high = _level(weight[r, 2 * i], scale)
                packed[r, i] = np.uint8((high << np.uint8(4)) | _level(weight[r, 2 * i + 1], scale))
            if stop % 2:
                packed[r, stop // 2] = _level(weight[r, stop - 1], scale) << np.uint8(4)


@kernel
def _decode_kernel(packed: Bytes, byte: Bytes, whole_scale: np.float32, weight: Float32) -> None:
    for r in range(weight.shape[0]):
        for c in range(byte.shape[1]):
            start = c * BLOCK_SIZE
            stop = min(start + BLOCK_SIZE, weight.shape[1])
            scale = np.float32(whole_scale * _SCALES[byte[r, c]])
            for i in range(start // 2, stop // 2):
                weight[r, 2 * i] = _VALUES[packed[r, i] >> np.uint8(4)] * scale
                weight[r, 2 * i + 1] = _VALUES[packed[r, i] & np.uint8(15)] * scale
            if stop % 2:
                weight[r, stop - 1] = _VALUES[packed[r, stop // 2] >> np.uint8(4)] * scale


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round blocks of 16 to 4-bit floats times their scale; see codecs/nvfp4_comfy.py."""
    whole_scale = scale_of(reduce(weight, fmt=fmt) if stats is None else stats)
    high, wide = (rounded_up(length, PAD) for length in weight.shape)
    packed = np.zeros((high, wide // 2), np.uint8)
    byte = np.zeros((high, wide // BLOCK_SIZE), np.uint8)
    _encode_kernel(frozen(weight, weight.shape), whole_scale, packed, byte)
    return {
        "weight": packed,
        "block_scale": swizzle(byte),
        "tensor_scale": np.array(whole_scale),
    }


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply magnitudes by their scales; see codecs/nvfp4_comfy.py."""
    del fmt
    high, wide = (rounded_up(length, PAD) for length in shape)
    weight = np.empty(shape, np.float32)
    byte = unswizzle(parts["block_scale"], high, wide // BLOCK_SIZE)
    packed = frozen(parts["weight"], (high, wide // 2))
    scale = np.float32(parts["tensor_scale"])
    _decode_kernel(packed, frozen(byte, byte.shape), scale, weight)
    return weight
