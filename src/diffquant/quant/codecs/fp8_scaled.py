"""FP8 with one float32 scale per tensor, whichever the 8 bits: decoded = qdata * scale.

scale = amax / largest. Two passes: `reduce` folds the chunks' largest magnitude, `encode`
multiplies by 1 / scale, clamps (rounding may leave the largest a unit beyond), rounds half to even.
Source: comfy_kitchen 0.2.40 tensor/fp8.py, backends/eager/quantization.py quantize_per_tensor_fp8;
its product with the rounded reciprocal differs from a quotient in the last bit. Two differences,
where comfy_kitchen stores NaN (0 * inf): the scale of a tensor of zeros is 1, and a scale whose
reciprocal would be infinite is 2**-126.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Decode, Encode, Float32, Parts

__all__ = ["reduce", "scale_for", "scaled_codec", "scales_for"]

_SMALLEST = np.float32(2.0**-126)


def scales_for(amax: Float32, largest: np.float32) -> Float32:
    """`scale_for` of many tensors, rows or blocks at once."""
    scale = amax / largest
    scale = np.where(np.isinf(np.float32(1) / scale), _SMALLEST, scale)
    found: Float32 = np.where(amax == 0, np.float32(1), scale)
    return found


def scale_for(amax: float, largest: np.float32) -> np.float32:
    """Divide amax by `largest` in float32; 1 where it is 0, never too small to be inverted."""
    if amax == 0:
        return np.float32(1)
    scale = np.float32(np.float32(amax) / largest)
    with np.errstate(all="ignore"):
        return _SMALLEST if np.isinf(np.float32(1) / scale) else scale


def reduce(weight: Float32, stats: float | None = None, *, fmt: str) -> float:
    """Fold a chunk into the largest magnitude seen so far; NaN wins.

    Args:
        weight: (R, K) float32.
        stats: what the chunks before gave, None for the first.
        fmt: not used.
    """
    del fmt
    amax = np.abs(weight).max(initial=0)
    return float(np.maximum(amax, np.float32(0 if stats is None else stats)))


def scaled_codec(
    largest: np.float32, bits_of: Callable[[Float32], Bytes], table: Float32
) -> tuple[Encode, Decode]:
    """The encoder and decoder of an 8-bit float under a scale.

    Args:
        largest: the largest finite value.
        bits_of: rounds float32 to bit patterns.
        table: the 256 values in bit order.
    """

    def encode(
        weight: Float32,
        stats: float | None = None,
        *,
        fmt: str,
        importance: Float32 | None = None,
    ) -> Parts:
        del importance
        scale = scale_for(reduce(weight, fmt=fmt) if stats is None else stats, largest)
        with np.errstate(all="ignore"):
            scaled = np.clip(weight * (np.float32(1) / scale), -largest, largest)
        return {"weight": bits_of(scaled), "scale": np.array(scale)}

    def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
        del fmt
        values: Float32 = table[parts["weight"]].reshape(shape)
        with np.errstate(all="ignore"):
            return values * np.float32(parts["scale"])

    return encode, decode
