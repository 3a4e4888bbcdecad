"""NF4: blocks of 64 of the flattened weight, float32 absmax each, 4-bit indices into a fixed table.

    weight   ceil(R * K / 2) bytes, element 2i in the high nibble of byte i, 2i + 1 in the low
    absmax   ceil(R * K / 64) float32                      decoded = CODE[index] * absmax

Blocks run over row ends, so a chunk of rows must start where a block does (FORMATS row_multiple);
only the last block of a tensor may be partial. The nearest table value wins, a tie the lower one.
Source: bitsandbytes 0.50.2 functional.py:788-805 (table), backends/default/ops.py quantize_4bit:
full blocks are multiplied by 1 / absmax, a partial one is divided by absmax and stores at least
1e-38; an odd last nibble encodes 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts

__all__ = ["BLOCK_SIZE", "BOUNDS", "CODE", "SMALLEST_ABSMAX", "decode", "encode"]

BLOCK_SIZE = 64
SMALLEST_ABSMAX = np.float32(1e-38)
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
_ONE = np.float32(1)


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
    flat = weight.reshape(-1)
    full = flat.size - flat.size % BLOCK_SIZE
    blocks, rest = flat[:full].reshape(-1, BLOCK_SIZE), flat[full:]
    with np.errstate(all="ignore"):
        absmax = np.abs(blocks).max(axis=1, initial=0)  # (B,)
        inverse = _ONE / np.maximum(absmax, SMALLEST_ABSMAX)
        index = _indices(blocks * inverse[:, None]).reshape(-1)
        if rest.size:
            last = np.maximum(np.abs(rest).max(), SMALLEST_ABSMAX)
            absmax = np.append(absmax, last)
            index = np.append(index, _indices(rest / last))
    if index.size % 2:
        index = np.append(index, np.uint8(7))  # CODE[7] is 0
    return {"weight": index[::2] << 4 | index[1::2], "absmax": absmax}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look indices up and multiply by their block's absmax, one float32 rounding.

    Args:
        parts: weight and absmax, as `encode` returns them, of any shape.
        shape: (R, K).
        fmt: not used.
    """
    del fmt
    size = math.prod(shape)
    packed = parts["weight"].reshape(-1)
    values: Float32 = CODE[np.stack([packed >> 4, packed & 15], axis=1)].reshape(-1)[:size]
    absmax: Float32 = np.repeat(parts["absmax"].reshape(-1), BLOCK_SIZE)[:size]
    with np.errstate(invalid="ignore"):
        return (values * absmax).reshape(shape)
