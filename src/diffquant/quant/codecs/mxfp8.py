"""MXFP8 as ComfyUI stores it: E4M3 values, a power of two per 32 of a row; 8.25 bits.

    weight       (N', K') E4M3, N and K rounded up to 32, zeros behind the weight
    block_scale  (N' rounded up to 128, K' / 32 rounded up to 4) E8M0, in tiles (swizzle.py)

decoded = value * 2**(byte - 127); a byte of 0 counts as scale 0. The exponent is that of amax / 448
rounded up, so that no value exceeds 448; log2 in float32 rounds a little above a power of two down
to it, and the clamp takes what sticks out. Source: comfy_kitchen 0.2.40 tensor/mxfp8.py,
backends/eager/quantization.py quantize_mxfp8, dequantize_mxfp8. One difference: where amax is not
zero but too small for the smallest scale (below 2.7e-36), comfy_kitchen divides by zero and stores
448 and NaN; here such a block is zeros, as it decodes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts
from diffquant.quant.codecs.fp8_e4m3 import E4M3_MAX, e4m3_bits, e4m3_table
from diffquant.quant.codecs.swizzle import rounded_up, swizzle, unswizzle

__all__ = ["BIAS", "BLOCK_SIZE", "PAD", "SCALES", "decode", "encode"]

BLOCK_SIZE, PAD, BIAS = 32, 32, 127
_VALUES = e4m3_table()
_SMALLEST = np.float32(2.0**-127)


def _scales() -> Float32:
    byte = np.arange(256)
    values = np.ldexp(np.float64(1), byte - BIAS)
    values[0], values[255] = 0, np.nan
    return values.astype(np.float32)


SCALES = _scales()


def _exponents(amax: Float32) -> Bytes:
    needed = np.maximum(amax / E4M3_MAX, _SMALLEST)
    whole = np.ceil(np.log2(needed.astype(np.float64)).astype(np.float32))
    byte: Bytes = np.clip(np.nan_to_num(whole, nan=BIAS) + BIAS, 0, 254).astype(np.uint8)
    return byte


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round blocks of 32 to E4M3 times a power of two.

    Args:
        weight: (R, K) float32, C-contiguous; R a multiple of 128 unless the rows end the tensor.
        stats: not used.
        fmt: not used.

    Returns:
        weight: (R rounded up to 32, K rounded up to 32) uint8; block_scale: uint8, in tiles.

    Error: relative 2**-4 for magnitudes above a block's amax / 28672, else amax * 2**-18.
    """
    del stats, fmt
    rows, columns = weight.shape
    whole = np.zeros((rounded_up(rows, PAD), rounded_up(columns, PAD)), np.float32)
    whole[:rows, :columns] = weight
    blocks = whole.reshape(len(whole), -1, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        byte = _exponents(np.abs(blocks).max(axis=2))  # (R', C)
        scaled = np.clip(blocks / SCALES[byte][:, :, None], -E4M3_MAX, E4M3_MAX)
    code = np.where(byte[:, :, None] > 0, e4m3_bits(scaled), np.uint8(0))
    return {"weight": code.reshape(whole.shape), "block_scale": swizzle(byte)}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply values by their block's scale, one float32 rounding.

    Args:
        parts: weight and block_scale, as `encode` returns them.
        shape: (R, K), without the padding.
        fmt: not used.
    """
    del fmt
    high, wide = rounded_up(shape[0], PAD), rounded_up(shape[1], PAD)
    byte = unswizzle(parts["block_scale"], high, wide // BLOCK_SIZE)
    values = _VALUES[parts["weight"]].reshape(high, -1, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        weight: Float32 = (values * SCALES[byte][:, :, None]).reshape(high, wide)
    return np.ascontiguousarray(weight[: shape[0], : shape[1]])
