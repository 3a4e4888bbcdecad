"""FP8 E4M3 with one float32 scale per output row: decoded = qdata * scale, scale = amax / 448.

    weight: (R, K) uint8, the bit patterns; scale: (R,) float32

Each row is what fp8_scaled.py makes of a tensor. Read by ComfyUI-QuantOps as
`float8_e4m3fn_rowwise`, not by ComfyUI itself. Source of the layout:
silveroxides/convert_to_quant@0e2909e:convert_to_quant/utils/comfy_quant.py (names) and
comfy/quant_ops.py RowWiseFP8Layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts
from diffquant.quant.codecs.fp8_e4m3 import E4M3_MAX, e4m3_bits, e4m3_table
from diffquant.quant.codecs.fp8_scaled import scales_for

__all__ = ["decode", "encode"]

_VALUES = e4m3_table()


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to E4M3 times their own scale.

    Args:
        weight: (R, K) float32, C-contiguous.
        stats: not used.
        fmt: not used.

    Returns:
        weight: (R, K) uint8; scale: (R,) float32.

    Error: relative 2**-4 for magnitudes above a row's amax / 28672, else scale * 2**-10.
    """
    del stats, fmt
    with np.errstate(all="ignore"):
        scale = scales_for(np.abs(weight).max(axis=1, initial=0), E4M3_MAX)
        scaled = weight * (np.float32(1) / scale)[:, None]
    return {"weight": e4m3_bits(np.clip(scaled, -E4M3_MAX, E4M3_MAX)), "scale": scale}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply values by their row's scale, one float32 rounding.

    Args:
        parts: weight: (R, K) uint8; scale: (R,) or (R, 1) float32.
        shape: (R, K).
        fmt: not used.
    """
    del fmt
    values: Float32 = _VALUES[parts["weight"]].reshape(shape)
    with np.errstate(all="ignore"):
        weight: Float32 = values * parts["scale"].reshape(shape[0], 1)
    return weight
