"""Fast twin of codecs/int8_convrot.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts
from diffquant.quant.codecs.numba import int8_rowwise
from diffquant.quant.codecs.numba.rotation import rotate
from diffquant.quant.formats import format_named

__all__ = ["decode", "encode"]


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Rotate, then quantize each row to int8; see codecs/int8_convrot.py."""
    return int8_rowwise.encode(rotate(weight, format_named(fmt).rotation), stats, fmt=fmt)


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by their row's scale, and rotate back; see codecs/int8_convrot.py."""
    return rotate(int8_rowwise.decode(parts, shape, fmt=fmt), format_named(fmt).rotation)
