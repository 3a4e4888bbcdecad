"""Plain floating point dtypes: f32 unchanged, f16, and bf16 as its bits in uint16.

    f16   sign 1, exponent 5,  fraction 10    largest 65504
    bf16  sign 1, exponent 8,  fraction 7     the upper half of a float32

Both round half to even. Overflow becomes infinity and is left for the caller to refuse; a NaN
becomes the one quiet NaN, whatever its sign and payload, so bytes are the same on every machine.
Source: IEEE 754-2019; bfloat16 as torch casts it (c10/util/BFloat16.h round_to_nearest_even).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Float32, Parts

__all__ = ["bf16_bits", "bf16_values", "decode", "encode", "f16_values"]

_QUIET_BF16 = 0x7FC0
_QUIET_F16 = 0x7E00


def f16_values(weight: Float32) -> NDArray[np.float16]:
    """Round float32 to float16, half to even. Any NaN becomes the quiet NaN 0x7E00."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = weight.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(weight), np.uint16(_QUIET_F16), rounded).view(np.float16)


def bf16_bits(weight: Float32) -> NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, half to even. Any NaN becomes the quiet NaN 0x7FC0."""
    bits = weight.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(weight), np.uint16(_QUIET_BF16), rounded)


def bf16_values(bits: NDArray[np.uint16]) -> Float32:
    """Widen bfloat16 bits to float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round rows to a floating point dtype.

    Args:
        weight: (R, K) float32, C-contiguous.
        stats: not used.
        fmt: f32, f16 or bf16.

    Returns:
        weight: (R, K); float32 (the argument itself), float16, or uint16 holding bfloat16 bits.

    Error: half a unit in the last place: relative 2**-11 for f16, 2**-8 for bf16, where normal.
    """
    del stats
    if fmt == "bf16":
        return {"weight": bf16_bits(weight)}
    if fmt == "f16":
        return {"weight": f16_values(weight)}
    return {"weight": weight}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Widen rows to float32, exact; f32 is returned as it is.

    Args:
        parts: weight, as `encode` returns it.
        shape: (R, K).
        fmt: f32, f16 or bf16.
    """
    stored = parts["weight"].reshape(shape)
    return bf16_values(stored) if fmt == "bf16" else stored.astype(np.float32, copy=False)
