"""bitsandbytes' int8: one absmax per output row, decoded = qdata * absmax / 127.

    weight  (R, K) int8        scb  (R,) float32, the row's absmax (not divided by 127)

Rounds half to even; a row of zeros has absmax 0 and codes 0. Source: bitsandbytes 0.50.2
backends/default/ops.py int8_vectorwise_quant (values are multiplied by (1 / absmax) * 127, as torch
divides a number by a tensor), _ops.py int8_vectorwise_dequant (two multiplications).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts

__all__ = ["ONE_LEVEL", "decode", "encode"]

ONE_LEVEL = np.float32(7.874015718698502e-3)  # 1 / 127
_LEVELS = np.float32(127)


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize each row to int8.

    Args:
        weight: (R, K) float32, C-contiguous.
        stats: not used.
        fmt: not used.

    Returns:
        weight: (R, K) int8 in [-127, 127]; scb: (R,) float32.

    Error: absmax(row) / 254 per element.
    """
    del stats, fmt
    with np.errstate(all="ignore"):
        absmax = np.abs(weight).max(axis=1, initial=0)
        level = np.rint(weight * (np.float32(1) / absmax * _LEVELS)[:, None])
    level = np.clip(np.nan_to_num(level, nan=0, posinf=0, neginf=0), -127, 127)
    return {"weight": level.astype(np.int8), "scb": absmax}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply levels by their row's absmax and by 1 / 127, two float32 roundings.

    Args:
        parts: weight: (R, K) int8; scb: (R,) float32.
        shape: (R, K).
        fmt: not used.
    """
    del fmt
    with np.errstate(all="ignore"):
        scaled = parts["weight"].reshape(shape).astype(np.float32) * parts["scb"].reshape(-1, 1)
        weight: Float32 = scaled * ONE_LEVEL
    return weight
