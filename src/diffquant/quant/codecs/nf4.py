"""NF4: blocks of 64 of the flattened weight, 4-bit indices into a fixed table of normal quantiles.

The layout is that of codecs/flat_blocks.py. The nearest table value wins, a tie the lower one.
Source: bitsandbytes 0.50.2 functional.py:788-805 (table), backends/default/ops.py quantize_4bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts
from diffquant.quant.codecs.flat_blocks import decode_flat, encode_flat

__all__ = ["BOUNDS", "CODE", "decode", "encode"]

_ONE, _ZERO = np.float32(1), 7  # CODE[7] is 0
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
CODE: Float32 = np.array(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    np.float32,
)
BOUNDS: Float32 = (CODE[:-1] + CODE[1:]) / np.float32(2)


def _indices(scaled: Float32) -> Bytes:
    # Index = how many bounds lie below; NaN counts as above all of them.
    clipped = np.clip(scaled, -_ONE, _ONE)
    return np.searchsorted(BOUNDS, clipped, side="left").astype(np.uint8)


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize rows to NF4.

    Args:
        weight: (R, K) float32, C-contiguous; R * K a multiple of 64 unless the rows end the tensor.
        stats: not used.
        fmt: not used.

    Returns:
        weight: (ceil(R * K / 2),) uint8; absmax: (ceil(R * K / 64),) float32.

    Error: 0.1519 * absmax per element, half the widest gap of the table.
    """
    del stats, fmt
    return encode_flat(weight, _indices, _ZERO)


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look indices up and multiply by their block's absmax, one float32 rounding.

    Args:
        parts: weight and absmax, as `encode` returns them, of any shape.
        shape: (R, K).
        fmt: not used.
    """
    del fmt
    return decode_flat(parts, shape, CODE)
