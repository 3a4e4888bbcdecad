"""int8 with one float32 scale per tensor: decoded = qdata * scale, scale = amax / 127.

    weight: (R, K) int8; scale: () float32

Rounds half to even; the scale is at least 1e-30, so zeros stay zeros. Two passes: the tensor's amax
comes first. ComfyUI loads it as `int8_tensorwise`, which takes one scale or one per row. Source:
comfy_kitchen 0.2.40 backends/eager/quantization.py quantize_int8_tensorwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts
from diffquant.quant.codecs.fp8_scaled import reduce
from diffquant.quant.codecs.int8_rowwise import SMALLEST_SCALE

__all__ = ["decode", "encode", "reduce", "scale_of"]


def scale_of(amax: float) -> np.float32:
    """Divide amax by 127 in float32; at least 1e-30."""
    scale: np.float32 = np.maximum(np.float32(amax) / np.float32(127), SMALLEST_SCALE)
    return scale


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize rows to int8 with the tensor's scale.

    Args:
        weight: (R, K) float32, C-contiguous.
        stats: amax of the whole tensor; of these rows when None.
        fmt: FORMATS name.

    Returns:
        weight: (R, K) int8; scale: () float32. NaN becomes 0, and the scale NaN.

    Error: scale / 2 per element.
    """
    scale = scale_of(reduce(weight, fmt=fmt) if stats is None else stats)
    with np.errstate(all="ignore"):
        level = np.clip(np.rint(weight / scale), -128, 127)
    return {"weight": np.nan_to_num(level, nan=0).astype(np.int8), "scale": np.array(scale)}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by the scale, one float32 rounding.

    Args:
        parts: weight: (R, K) int8; scale: () float32.
        shape: (R, K).
        fmt: not used.
    """
    del fmt
    with np.errstate(invalid="ignore"):
        weight: Float32 = parts["weight"].astype(np.float32) * np.float32(parts["scale"])
    return weight.reshape(shape)
