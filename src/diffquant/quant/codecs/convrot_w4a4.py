"""4-bit integer rows of a rotated weight, one float32 scale per row.

    weight  (R, K / 2) int8: even columns in the low nibble, two's complement in [-7, 7]
    scale   (R,) float32 = absmax(row) / 7, absmax at least 1e-10

decoded = (level * scale), rotated back (codecs/rotation.py). Rounds half to even. Source:
comfy_kitchen 0.2.40 backends/eager/convrot_w4a4.py:108-165, svdquant.py (nibbles).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts
from diffquant.quant.codecs.rotation import rotate
from diffquant.quant.formats import format_named

__all__ = ["SMALLEST_ABSMAX", "decode", "encode", "signed_nibbles"]

SMALLEST_ABSMAX = np.float32(1e-10)
_LEVELS = np.float32(7)


def signed_nibbles(packed: NDArray[np.int8]) -> NDArray[np.int8]:
    """Numbers in [-8, 7] of packed bytes: (R, K / 2) -> (R, K), low nibble first."""
    low, high = (packed << 4).astype(np.int8) >> 4, packed >> 4
    return np.stack([low, high], axis=2).reshape(len(packed), -1)


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Rotate, then quantize each row to 4 bits.

    Args:
        weight: (R, K) float32, C-contiguous; K a multiple of the format's group.
        stats: not used.
        fmt: its row names the group.

    Returns:
        weight: (R, K / 2) int8; scale: (R,) float32.

    Error: scale / 2 per rotated element.
    """
    del stats
    rotated = rotate(weight, format_named(fmt).rotation)
    with np.errstate(all="ignore"):
        scale = np.maximum(np.abs(rotated).max(axis=1, initial=0), SMALLEST_ABSMAX) / _LEVELS
        level = np.clip(np.rint(rotated / scale[:, None]), -_LEVELS, _LEVELS)
    code = np.nan_to_num(level, nan=0).astype(np.int8).view(np.uint8)
    packed = (code[:, ::2] & 15) | (code[:, 1::2] << 4)
    return {"weight": packed.view(np.int8), "scale": scale}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by their row's scale, and rotate back.

    Args:
        parts: as `encode` returns them; the scale in any shape of R values.
        shape: (R, K).
        fmt: its row names the group.
    """
    packed = parts["weight"].reshape(shape[0], shape[1] // 2).view(np.int8)
    with np.errstate(all="ignore"):
        rotated = signed_nibbles(packed).astype(np.float32) * parts["scale"].reshape(-1, 1)
    return rotate(rotated, format_named(fmt).rotation)
