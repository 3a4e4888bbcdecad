"""The torch reference decoder of every number format: one function per format, one table.

Each function takes the stored parts of a weight, its logical shape and the wanted dtype; it decodes
in float32 and casts at the end, on whatever device the parts are on. Nothing here is fast on
purpose: these functions say what the bytes mean, run everywhere, and judge the fast kernels.

Stored parts (N is the first dimension of the logical shape, K the product of the others)::

    f32 f16 bf16        weight: the tensor itself
    q*_0 q*_1 q*_k      weight: uint8 (N, bytes per row), ggml blocks of 32 or 256 along a row
    iq* tq* mxfp4 nvfp4 the same; in grid_blocks.py, nonlinear.py and ternary.py
    fp8_e4m3            weight: float8_e4m3fn (N, K)
    fp8_e4m3_scaled     the same, and scale: float32 ()
    fp8_e5m2 and scaled the same in float8_e5m2
    int8_tensor         weight: int8 (N, K); scale: float32 ()
    int8_rowwise        weight: int8 (N, K); scale: float32 (N, 1); fp8_e4m3_rowwise in fp8
    *_blockwise         weight (N, K); block_scale: float32 (N / 128, K / 128)
    mxfp8 nvfp4_comfy   weight, block_scale, tensor_scale as stored, padded; in tiled_scales.py
    nf4 fp4 int8_bnb    in bnb.py
    int8_convrot w4a4   in rotated.py

Sources: ggml-org/ggml ggml-common.h (block structs) and ggml-quants.c (dequantize_row_*).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffquant.runtime.kernels import (
    bnb,
    grid_blocks,
    nonlinear,
    rotated,
    ternary,
    tiled_scales,
)
from diffquant.runtime.kernels.fields import Kernel, Parts, half, of_blocks, shifted

__all__ = ["KERNELS", "ROWWISE"]


def _plain(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return parts["weight"].reshape(shape).to(dtype)


def _high_bits(blocks: Tensor, start: int) -> Tensor:
    """The 32 bits of a little-endian uint32 per block, as fifth bits of nibbles: (B, 32)."""
    by = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = (blocks[:, start : start + 4, None] >> by) & 1  # (B, 4, 8)
    return bits.flatten(1) << 4


def _q8_0(blocks: Tensor) -> Tensor:  # d f16, q int8[32]
    return blocks[:, 2:].contiguous().view(torch.int8).float() * half(blocks, 0)


def _q4_0(blocks: Tensor) -> Tensor:  # d f16, q[16]: low nibbles are elements 0-15
    q = shifted(blocks[:, 2:], (0, 4), 15).flatten(1)
    return (q.float() - 8) * half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:  # d f16, m f16, q[16]
    q = shifted(blocks[:, 4:], (0, 4), 15).flatten(1)
    return q.float() * half(blocks, 0) + half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:  # d f16, qh u32, q[16]
    q = shifted(blocks[:, 6:], (0, 4), 15).flatten(1) | _high_bits(blocks, 2)
    return (q.float() - 16) * half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:  # d f16, m f16, qh u32, q[16]
    q = shifted(blocks[:, 8:], (0, 4), 15).flatten(1) | _high_bits(blocks, 4)
    return q.float() * half(blocks, 0) + half(blocks, 2)


def _q2_k(blocks: Tensor) -> Tensor:  # scale | min << 4 [16], q[64]: four levels, d, dmin f16
    scale = (blocks[:, :16] & 15).float() * half(blocks, 80)
    minimum = (blocks[:, :16] >> 4).float() * half(blocks, 82)
    q = shifted(blocks[:, 16:80].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 16, 16)
    return q.float() * scale.unsqueeze(-1) - minimum.unsqueeze(-1)


def _q3_k(blocks: Tensor) -> Tensor:  # third bits [32], q[64]: four levels, scales[12], d f16
    nibbles = shifted(blocks[:, 96:104], (0, 4), 15).flatten(1)
    upper = shifted(blocks[:, 104:108], (0, 2, 4, 6), 3).flatten(1)
    scale = half(blocks, 108) * ((nibbles | upper << 4).float() - 32)
    third = shifted(blocks[:, :32], tuple(range(8)), 1)  # (B, 8, 32)
    lower = shifted(blocks[:, 32:96].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    q = (lower | third << 2).float() - 4
    return scale.unsqueeze(-1) * q.reshape(-1, 16, 16)


def _scales_and_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and minima of a Q4_K or Q5_K block: float32 (B, 8, 1) each.

    Twelve bytes at offset 4 hold sixteen 6-bit numbers: bytes 0-3 the scales 0-3 (low six bits),
    bytes 4-7 the minima 0-3; bytes 8-11 the low nibbles of scales and minima 4-7, whose two high
    bits are the top bits of bytes 0-3 and 4-7.
    """
    first, second, third = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, (third & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 2) & 48)), dim=1)
    d, dmin = half(blocks, 0), half(blocks, 2)
    return (d * scales.float()).unsqueeze(-1), (dmin * minima.float()).unsqueeze(-1)


def _q4_k(blocks: Tensor) -> Tensor:  # d, dmin f16, scales[12], q[128]
    scale, minimum = _scales_and_mins(blocks)
    q = shifted(blocks[:, 16:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    return q.float() * scale - minimum


def _q5_k(blocks: Tensor) -> Tensor:  # d, dmin f16, scales[12], qh[32], q[128]
    scale, minimum = _scales_and_mins(blocks)
    q = shifted(blocks[:, 48:].reshape(-1, 4, 32), (0, 4), 15).reshape(-1, 8, 32)
    high = shifted(blocks[:, 16:48], tuple(range(8)), 1)  # (B, 8, 32)
    return (q | (high << 4)).float() * scale - minimum


def _q6_k(blocks: Tensor) -> Tensor:  # ql[128], qh[64], scales int8[16], d f16
    low = shifted(blocks[:, :128].reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 8, 32)
    high = shifted(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * half(blocks, 208)
    q = (low | (high << 4)).float() - 32
    return q.reshape(-1, 16, 16) * scales.unsqueeze(-1)


def _scaled(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (parts["weight"].float() * parts["scale"]).reshape(shape).to(dtype)


def _scaled_rows(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _scaled({**parts, "scale": parts["scale"].reshape(-1, 1)}, shape, dtype)


KERNELS: Mapping[str, Kernel] = {
    "f32": _plain,
    "f16": _plain,
    "bf16": _plain,
    "q8_0": of_blocks(34, _q8_0),
    "q4_0": of_blocks(18, _q4_0),
    "q4_1": of_blocks(20, _q4_1),
    "q5_0": of_blocks(22, _q5_0),
    "q5_1": of_blocks(24, _q5_1),
    "q2_k": of_blocks(84, _q2_k),
    "q3_k": of_blocks(110, _q3_k),
    "q4_k": of_blocks(144, _q4_k),
    "q5_k": of_blocks(176, _q5_k),
    "q6_k": of_blocks(210, _q6_k),
    **grid_blocks.KERNELS,
    **nonlinear.KERNELS,
    **ternary.KERNELS,
    "fp8_e4m3": _plain,
    "fp8_e4m3_scaled": _scaled,
    "fp8_e5m2": _plain,
    "fp8_e5m2_scaled": _scaled,
    "int8_tensor": _scaled,
    "fp8_e4m3_rowwise": _scaled_rows,
    "int8_rowwise": _scaled,
    **bnb.KERNELS,
    **rotated.KERNELS,
    **tiled_scales.KERNELS,
}

# Formats whose parts are stored row by row (or hold one value for all): rows can be picked before
# decoding. Flat blocks begin anywhere in a row; tiles hold the scales of many rows, and a codebook
# may be as long as the weight is high.
_CODEBOOKS = {name for name in rotated.KERNELS if name.startswith("asym_w4a8")}
ROWWISE = frozenset(KERNELS) - {*bnb.FLAT, *tiled_scales.KERNELS, *_CODEBOOKS}
