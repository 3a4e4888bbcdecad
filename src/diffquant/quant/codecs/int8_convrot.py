"""int8 rows of a rotated weight: codecs/rotation.py, then codecs/int8_rowwise.py.

    weight  (R, K) int8 of the rotated weight        scale  (R, 1) float32

decoded = (qdata * scale), rotated back. Source: comfy_kitchen 0.2.40
backends/eager/quantization.py:899-926 (quantize_int8_convrot_weight, dequantize_...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from diffquant.quant.codecs import int8_rowwise
from diffquant.quant.codecs.arrays import Float32, Parts
from diffquant.quant.codecs.rotation import rotate
from diffquant.quant.formats import format_named

__all__ = ["decode", "encode"]


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Rotate, then quantize each row to int8.

    Args:
        weight: (R, K) float32, C-contiguous; K a multiple of the format's group.
        stats: not used.
        fmt: its row names the group.

    Returns:
        weight: (R, K) int8; scale: (R, 1) float32.

    Error: scale / 2 per rotated element; the root of the sum of squares is kept by the rotation.
    """
    return int8_rowwise.encode(rotate(weight, format_named(fmt).rotation), stats, fmt=fmt)


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by their row's scale, and rotate back.

    Args:
        parts: weight: (R, K) int8; scale: (R, 1) float32.
        shape: (R, K).
        fmt: its row names the group.
    """
    return rotate(int8_rowwise.decode(parts, shape, fmt=fmt), format_named(fmt).rotation)
