"""int8 with one float32 scale per output row: decoded = qdata * scale, scale = absmax(row) / 127.

Rounds half to even; a scale is at least 1e-30, so rows of zeros stay zeros. Source: comfy_kitchen
0.2.40 backends/eager/quantization.py quantize_int8_rowwise, dequantize_int8_simple; ComfyUI loads
it as `int8_tensorwise` with a scale of shape (R, 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts

__all__ = ["SMALLEST_SCALE", "decode", "encode"]

SMALLEST_SCALE = np.float32(1e-30)


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize each row to int8.

    Args:
        weight: (R, K) float32, C-contiguous.
        stats: not used.
        fmt: not used.

    Returns:
        weight: (R, K) int8; scale: (R, 1) float32. NaN becomes 0, and its row's scale NaN.

    Error: scale / 2 per element.
    """
    del stats, fmt
    with np.errstate(all="ignore"):
        absmax = np.abs(weight).max(axis=1, keepdims=True, initial=0)
        scale = np.maximum(absmax / np.float32(127), SMALLEST_SCALE)  # (R, 1)
        level = np.clip(np.rint(weight / scale), -128, 127)
    return {"weight": np.nan_to_num(level, nan=0).astype(np.int8), "scale": scale}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by their row's scale, one float32 rounding.

    Args:
        parts: weight: (R, K) int8; scale: (R, 1) float32.
        shape: (R, K).
        fmt: not used.
    """
    del fmt
    with np.errstate(invalid="ignore"):
        weight: Float32 = parts["weight"].astype(np.float32) * parts["scale"]
    return weight.reshape(shape)
