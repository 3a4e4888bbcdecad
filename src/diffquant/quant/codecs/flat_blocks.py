"""Blocks of 64 of the flattened weight with 4-bit codes, as bitsandbytes lays them out.

    weight   ceil(R * K / 2) bytes, element 2i in the high nibble of byte i, 2i + 1 in the low
    absmax   ceil(R * K / 64) float32                      decoded = table[code] * absmax

Blocks run over row ends, so a chunk of rows must start where a block does (FORMATS row_multiple);
only the last block of a tensor may be partial. Source: bitsandbytes 0.50.2 backends/default/ops.py
quantize_4bit: full blocks are multiplied by 1 / absmax, a partial one is divided by absmax and
stores at least 1e-38; behind an odd last element stands the code of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts

__all__ = ["BLOCK_SIZE", "SMALLEST_ABSMAX", "decode_flat", "encode_flat"]

BLOCK_SIZE = 64
SMALLEST_ABSMAX = np.float32(1e-38)
_ONE = np.float32(1)


def encode_flat(weight: Float32, codes_of: Callable[[Float32], Bytes], zero: int) -> Parts:
    """Scale blocks to [-1, 1], look their codes up and pack two to a byte.

    Args:
        weight: (R, K) float32; R * K a multiple of 64 unless the rows end the tensor.
        codes_of: scaled values, which may be NaN -> codes.
        zero: the code of 0.

    Returns:
        weight: (ceil(R * K / 2),) uint8; absmax: (ceil(R * K / 64),) float32.
    """
    flat = weight.reshape(-1)
    full = flat.size - flat.size % BLOCK_SIZE
    blocks, rest = flat[:full].reshape(-1, BLOCK_SIZE), flat[full:]
    with np.errstate(all="ignore"):
        absmax = np.abs(blocks).max(axis=1, initial=0)  # (B,)
        inverse = _ONE / np.maximum(absmax, SMALLEST_ABSMAX)
        code = codes_of(blocks * inverse[:, None]).reshape(-1)
        if rest.size:
            last = np.maximum(np.abs(rest).max(), SMALLEST_ABSMAX)
            absmax = np.append(absmax, last)
            code = np.append(code, codes_of(rest / last))
    if code.size % 2:
        code = np.append(code, np.uint8(zero))
    return {"weight": code[::2] << 4 | code[1::2], "absmax": absmax}


def decode_flat(
    parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], table: Float32
) -> Float32:
    """Look codes up and multiply by their block's absmax, one float32 rounding."""
    size = math.prod(shape)
    packed = parts["weight"].reshape(-1)
    values: Float32 = table[np.stack([packed >> 4, packed & 15], axis=1)].reshape(-1)[:size]
    absmax: Float32 = np.repeat(parts["absmax"].reshape(-1), BLOCK_SIZE)[:size]
    with np.errstate(invalid="ignore"):
        return (values * absmax).reshape(shape)
