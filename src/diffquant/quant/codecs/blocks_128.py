"""FP8 E4M3 and int8 with one float32 scale per 128 x 128 block: decoded = qdata * scale.

    weight       (R, K) uint8, the bit patterns, or int8
    block_scale  (R / 128, K / 128) float32 = amax / 448, or amax / 127 (at least 1e-30)

FORMATS wants whole blocks; only the last rows of a chunk may be fewer. Read by ComfyUI-QuantOps as
`float8_e4m3fn_blockwise` and `int8_blockwise` with group_size 128, not by ComfyUI itself. Blocks
are rounded as fp8_scaled.py and int8_tensor.py round tensors. Source of the layout:
silveroxides/convert_to_quant@0e2909e:convert_to_quant/utils/comfy_quant.py (names, group_size) and
comfy/quant_ops.py BlockWiseFP8Layout, BlockWiseINT8Layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import UnsupportedShape
from diffquant.quant.codecs.arrays import Float32, Parts
from diffquant.quant.codecs.fp8_e4m3 import E4M3_MAX, e4m3_bits, e4m3_table
from diffquant.quant.codecs.fp8_scaled import scales_for
from diffquant.quant.codecs.int8_rowwise import SMALLEST_SCALE

__all__ = ["BLOCK_SIZE", "block_counts", "block_scales", "decode", "encode"]

BLOCK_SIZE = 128
_VALUES = e4m3_table()


def block_counts(shape: tuple[int, ...]) -> tuple[int, int]:
    """Count the blocks of rows and of columns.

    Raises:
        UnsupportedShape: the row length is not divisible by 128.
    """
    if shape[1] % BLOCK_SIZE:
        raise UnsupportedShape(f"row length must be divisible by {BLOCK_SIZE}, got {shape}")
    return -(-shape[0] // BLOCK_SIZE), shape[1] // BLOCK_SIZE


def block_scales(amax: Float32, fmt: str) -> Float32:
    """Scales of blocks by their largest magnitudes."""
    with np.errstate(all="ignore"):
        if fmt.startswith("fp8"):
            return scales_for(amax, E4M3_MAX)
        scale: Float32 = np.maximum(amax / np.float32(127), SMALLEST_SCALE)
        return scale


def _spread(values: Float32, rows: int) -> Float32:
    return values.repeat(BLOCK_SIZE, axis=0)[:rows].repeat(BLOCK_SIZE, axis=1)


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round blocks with their own scale.

    Args:
        weight: (R, K) float32, C-contiguous; R a multiple of 128 unless the rows end the tensor.
        stats: not used.
        fmt: fp8_e4m3_blockwise or int8_blockwise.

    Returns:
        weight: (R, K) uint8 or int8; block_scale: (R / 128, K / 128) float32.

    Raises:
        UnsupportedShape: the row length is not divisible by 128.
    """
    del stats
    rows = len(weight)
    n, k = block_counts(weight.shape)
    whole = np.zeros((n * BLOCK_SIZE, k * BLOCK_SIZE), np.float32)
    whole[:rows] = np.abs(weight)
    amax = whole.reshape(n, BLOCK_SIZE, k, BLOCK_SIZE).max(axis=(1, 3), initial=0)
    scale = block_scales(amax, fmt)
    with np.errstate(all="ignore"):
        if fmt.startswith("fp8"):
            scaled = np.clip(weight * _spread(np.float32(1) / scale, rows), -E4M3_MAX, E4M3_MAX)
            return {"weight": e4m3_bits(scaled), "block_scale": scale}
        level = np.clip(np.rint(weight / _spread(scale, rows)), -128, 127)
    return {"weight": np.nan_to_num(level, nan=0).astype(np.int8), "block_scale": scale}


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply numbers by their block's scale, one float32 rounding.

    Args:
        parts: weight and block_scale, as `encode` returns them.
        shape: (R, K).
        fmt: as for `encode`.
    """
    packed = parts["weight"].reshape(shape)
    values = _VALUES[packed] if fmt.startswith("fp8") else packed.astype(np.float32)
    with np.errstate(all="ignore"):
        scale = parts["block_scale"].reshape(block_counts(shape))
        weight: Float32 = values * _spread(scale, shape[0])
    return weight
