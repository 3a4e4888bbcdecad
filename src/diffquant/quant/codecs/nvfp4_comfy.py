"""NVFP4 as ComfyUI stores it: 4-bit floats, an E4M3 scale per 16, one float32 for the tensor.

    weight        (N', K' / 2) bytes, N and K rounded up to 16: even column in the high nibble
    block_scale   (N' rounded up to 128, K' / 16 rounded up to 4) E4M3, in tiles (swizzle.py)
    tensor_scale  () float32 = amax / (448 * 6)

A nibble is a sign above a 3-bit magnitude: 0, 0.5, 1, 1.5, 2, 3, 4, 6. decoded = magnitude *
(tensor_scale * block_scale), both products rounded to float32. Two passes: the tensor's amax comes
first. ModelOpt packs the low nibble first and ggml's nvfp4 has neither a tensor scale nor tiles:
other formats. Source: comfy_kitchen 0.2.40 tensor/nvfp4.py, backends/eager/quantization.py
quantize_nvfp4, dequantize_nvfp4, float_utils.py _f32_to_floatx_unpacked. One difference: a tensor
of zeros gets scale 1 and zero bytes, where comfy_kitchen divides 0 by 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts
from diffquant.quant.codecs.fp8_e4m3 import E4M3_MAX, e4m3_bits, e4m3_table
from diffquant.quant.codecs.fp8_scaled import reduce
from diffquant.quant.codecs.swizzle import rounded_up, swizzle, unswizzle

__all__ = [
    "BLOCK_SIZE",
    "LARGEST",
    "MIDPOINTS",
    "PAD",
    "VALUES",
    "decode",
    "encode",
    "reduce",
    "scale_of",
]

BLOCK_SIZE, PAD = 16, 16
LARGEST = np.float32(6)
_MAGNITUDES = np.array((0, 0.5, 1, 1.5, 2, 3, 4, 6), np.float32)
VALUES: Float32 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
MIDPOINTS: Float32 = (_MAGNITUDES[:-1] + _MAGNITUDES[1:]) / np.float32(2)
_SCALES = e4m3_table()


def scale_of(amax: float) -> np.float32:
    """Divide amax by 448 * 6 in float32, and 1 where that is 0."""
    scale = np.float32(np.float32(amax) / (E4M3_MAX * LARGEST))
    return scale if scale != 0 else np.float32(1)


def _levels(scaled: Float32) -> Bytes:
    """The nearest magnitude, a tie to the even code, under the sign; NaN becomes 6."""
    size = np.abs(scaled)
    level = np.zeros(size.shape, np.uint8)
    for lower, middle in enumerate(MIDPOINTS):
        # A tie goes up from an odd code, and stays on an even one.
        level += ~(size < middle if lower % 2 else size <= middle)
    sign = scaled.view(np.uint32) >> np.uint32(28) & np.uint32(8)
    code: Bytes = level | sign.astype(np.uint8)
    return code


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Round blocks of 16 to 4-bit floats times their scale.

    Args:
        weight: (R, K) float32, C-contiguous; R a multiple of 128 unless the rows end the tensor.
        stats: amax of the whole tensor; of these rows when None.
        fmt: FORMATS name.

    Returns:
        weight: (R rounded up to 16, K rounded up to 16, halved) uint8; block_scale: uint8, in
        tiles; tensor_scale: () float32.

    Error: one block scale per element, half the widest gap; more where the scale rounds down.
    """
    whole_scale = scale_of(reduce(weight, fmt=fmt) if stats is None else stats)
    rows, columns = weight.shape
    whole = np.zeros((rounded_up(rows, PAD), rounded_up(columns, PAD)), np.float32)
    whole[:rows, :columns] = weight
    blocks = whole.reshape(len(whole), -1, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        wanted = np.abs(blocks).max(axis=2) / LARGEST / whole_scale  # (R', C)
        byte = e4m3_bits(np.minimum(wanted, E4M3_MAX))
        scale = whole_scale * _SCALES[byte]
        safe = np.where(scale == 0, np.float32(1), scale)[:, :, None]
        scaled: Float32 = np.clip(blocks / safe, -LARGEST, LARGEST)
    code = np.where(scale[:, :, None] == 0, np.uint8(0), _levels(scaled)).reshape(whole.shape)
    return {
        "weight": code[:, ::2] << 4 | code[:, 1::2],
        "block_scale": swizzle(byte),
        "tensor_scale": np.array(whole_scale),
    }


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Multiply magnitudes by their block's scale and the tensor's.

    Args:
        parts: weight, block_scale and tensor_scale, as `encode` returns them.
        shape: (R, K), without the padding.
        fmt: not used.
    """
    del fmt
    high, wide = rounded_up(shape[0], PAD), rounded_up(shape[1], PAD)
    byte = unswizzle(parts["block_scale"], high, wide // BLOCK_SIZE)
    packed = parts["weight"].reshape(high, wide // 2)
    values = VALUES[np.stack([packed >> 4, packed & 15], axis=2)].reshape(high, -1, BLOCK_SIZE)
    with np.errstate(all="ignore"):
        scale = np.float32(parts["tensor_scale"]) * _SCALES[byte]
        weight: Float32 = (values * scale[:, :, None]).reshape(high, wide)
    return np.ascontiguousarray(weight[: shape[0], : shape[1]])
