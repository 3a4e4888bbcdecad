"""The torch reference decoders of formats whose scales are those of many rows together.

Stored as quant/codecs/mxfp8.py, nvfp4_comfy.py and blocks_128.py say; padding is cut off.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffquant.quant.codecs import mxfp8, nvfp4_comfy
from diffquant.runtime.kernels.fields import Kernel, Parts

__all__ = ["KERNELS"]


def _unswizzled(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in the order of the blocks: (rows, columns); see quant/codecs/swizzle.py."""
    high, wide = stored.shape
    tiles = stored.reshape(high // 128, wide // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(high, wide)[:rows, :columns]


def _scaled(values: Tensor, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """(R, C, block) values times (R, C) scales, without the padding."""
    weight = (values * scale.unsqueeze(-1)).flatten(1)
    return weight[: shape[0], : shape[1]].to(dtype)


def _mxfp8(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    weight = parts["weight"]
    values = weight.float().reshape(len(weight), -1, mxfp8.BLOCK_SIZE)
    byte = _unswizzled(parts["block_scale"], *values.shape[:2])
    table = torch.tensor(mxfp8.SCALES, device=weight.device)
    return _scaled(values, table[byte.int()], shape, dtype)


def _nvfp4(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    packed = parts["weight"]
    table = torch.tensor(nvfp4_comfy.VALUES, device=packed.device)
    codes = torch.stack((packed >> 4, packed & 15), dim=2)  # even columns are the high nibbles
    values = table[codes.int()].reshape(len(packed), -1, nvfp4_comfy.BLOCK_SIZE)
    byte = _unswizzled(parts["block_scale"].view(torch.uint8), *values.shape[:2])
    scale = byte.contiguous().view(torch.float8_e4m3fn).float() * parts["tensor_scale"]
    return _scaled(values, scale, shape, dtype)


def _blocks_128(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    scale = parts["block_scale"].repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)
    return (parts["weight"].float() * scale).to(dtype)


KERNELS: Mapping[str, Kernel] = {
    "mxfp8": _mxfp8,
    "nvfp4_comfy": _nvfp4,
    "fp8_e4m3_blockwise": _blocks_128,
    "int8_blockwise": _blocks_128,
}
