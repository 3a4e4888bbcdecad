"""bitsandbytes' FP4: blocks of 64 of the flattened weight, 4-bit floats.

The layout is that of codecs/flat_blocks.py. A code's bits are sign, exponent and fraction, so the
table is not ascending: codes are found among the sorted values and translated by ORDER. A zero is
always code 0. Source: bitsandbytes 0.50.2 functional.py:806-823 (table, divided by 12),
backends/default/ops.py quantize_4bit, _get_4bit_quantize_bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts
from diffquant.quant.codecs.flat_blocks import decode_flat, encode_flat

__all__ = ["BOUNDS", "CODE", "ORDER", "decode", "encode"]

_ONE = np.float32(1)
_TWELFTHS = np.array((0, 0.0625, 8, 12, 4, 6, 2, 3), np.float32) / np.float32(12)
CODE: Float32 = np.concatenate([_TWELFTHS, np.float32(0) - _TWELFTHS])
# Sorted position -> code, among the fifteen values that differ and a second zero that is not used.
ORDER: Bytes = np.array((11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3), np.uint8)
BOUNDS: Float32 = (CODE[ORDER][:-1] + CODE[ORDER][1:]) / np.float32(2)


def _codes(scaled: Float32) -> Bytes:
    # How many bounds lie below; NaN counts as above all of them.
    found: Bytes = ORDER[np.searchsorted(BOUNDS, np.clip(scaled, -_ONE, _ONE), side="left")]
    return found


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Quantize rows to FP4.

    Args:
        weight: (R, K) float32, C-contiguous; R * K a multiple of 64 unless the rows end the tensor.
        stats: not used.
        fmt: not used.

    Returns:
        weight: (ceil(R * K / 2),) uint8; absmax: (ceil(R * K / 64),) float32.

    Error: absmax / 6 per element, half the widest gap of the table.
    """
    del stats, fmt
    return encode_flat(weight, _codes, 0)


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look codes up and multiply by their block's absmax, one float32 rounding.

    Args:
        parts: weight and absmax, as `encode` returns them, of any shape.
        shape: (R, K).
        fmt: not used.
    """
    del fmt
    return decode_flat(parts, shape, CODE)
