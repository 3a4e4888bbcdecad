"""Fast twin of codecs/convrot_w4a4.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts, frozen
from diffquant.quant.codecs.convrot_w4a4 import SMALLEST_ABSMAX
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.floats import magnitude_bits, nearest_int
from diffquant.quant.codecs.numba.rotation import rotate
from diffquant.quant.formats import format_named

__all__ = ["decode", "encode"]

_LEVELS = np.float32(7)


@kernel
def _encode_kernel(rotated: Float32, packed: NDArray[np.int8], scale: Float32) -> None:
    for r in range(rotated.shape[0]):
        bits = np.int32(0)
        for k in range(rotated.shape[1]):
            size = magnitude_bits(rotated[r, k])
            bits = size if size > bits else bits
        amax = np.int32(bits).view(np.float32)
        step = np.float32((SMALLEST_ABSMAX if amax < SMALLEST_ABSMAX else amax) / _LEVELS)
        scale[r] = step
        # A quotient is at most 7 and a rounding, or NaN, whose bits nearest_int reads as 0.
        for i in range(packed.shape[1]):
            low = nearest_int(np.float32(rotated[r, 2 * i] / step))
            high = nearest_int(np.float32(rotated[r, 2 * i + 1] / step))
            packed[r, i] = np.int8((low & np.int32(15)) | np.int32(high << np.int32(4)))


@kernel
def _decode_kernel(packed: NDArray[np.int8], scale: Float32, rotated: Float32) -> None:
    for r in range(packed.shape[0]):
        for i in range(packed.shape[1]):
            byte = np.int32(packed[r, i])
            low = np.int32(np.int32(byte << np.int32(28)) >> np.int32(28))
            rotated[r, 2 * i] = np.float32(low) * scale[r]
            rotated[r, 2 * i + 1] = np.float32(np.int32(byte >> np.int32(4))) * scale[r]


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Rotate, then quantize each row to 4 bits; see codecs/convrot_w4a4.py."""
    del stats
    rotated = rotate(weight, format_named(fmt).rotation)
    packed = np.empty((len(weight), weight.shape[1] // 2), np.int8)
    scale = np.empty(len(weight), np.float32)
    _encode_kernel(rotated, packed, scale)
    return {"weight": packed, "scale": scale}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by their row's scale, and rotate back; see codecs/convrot_w4a4.py."""
    rotated = np.empty(shape, np.float32)
    packed = frozen(parts["weight"], (shape[0], shape[1] // 2)).view(np.int8)
    _decode_kernel(packed, frozen(parts["scale"], shape[0]), rotated)
    return rotate(rotated, format_named(fmt).rotation)
