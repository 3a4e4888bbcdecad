"""FP8 E4M3 with one float32 scale per tensor: decoded = qdata * scale, scale = amax / 448.

Two passes: `reduce` folds the chunks' largest magnitude, `encode` divides by the scale, clamps to
+-448 (rounding of the scale may leave the largest weight a unit beyond) and rounds half to even.
Source: comfy_kitchen 0.2.40 tensor/fp8.py, which ComfyUI loads as `float8_e4m3fn`; bytes equal
torch's `(w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)`. One difference: comfy_kitchen
stores an all-zero tensor with scale 0 and NaN bytes (0 * inf); here its scale is 1 and its bytes
are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs import fp8_e4m3
from diffquant.quant.codecs.arrays import Float32, Parts

__all__ = ["decode", "encode", "reduce", "scale_of"]


def scale_of(amax: float) -> np.float32:
    """Divide amax by 448 in float32, and 1 where that is 0."""
    scale = np.float32(np.float32(amax) / fp8_e4m3.E4M3_MAX)
    return scale if scale != 0 else np.float32(1)


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


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to E4M3 times the tensor's scale.

    Args:
        weight: (R, K) float32, C-contiguous.
        stats: amax of the whole tensor; of these rows when None.
        fmt: FORMATS name.

    Returns:
        weight: (R, K) uint8, the bit patterns; scale: () float32.

    Error: relative 2**-4 for magnitudes above amax / 28672, else absolute scale * 2**-10.
    """
    scale = scale_of(reduce(weight, fmt=fmt) if stats is None else stats)
    with np.errstate(all="ignore"):
        scaled = np.clip(weight / scale, -fp8_e4m3.E4M3_MAX, fp8_e4m3.E4M3_MAX)
    return {"weight": fp8_e4m3.e4m3_bits(scaled), "scale": np.array(scale)}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply bit patterns' values by the scale, one float32 rounding.

    Args:
        parts: weight: (R, K) uint8; scale: () float32.
        shape: (R, K).
        fmt: FORMATS name.
    """
    with np.errstate(all="ignore"):
        return fp8_e4m3.decode(parts, shape, fmt=fmt) * np.float32(parts["scale"])
