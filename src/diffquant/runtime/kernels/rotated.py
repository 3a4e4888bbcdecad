"""The torch reference decoders of rotated integers.

Stored as quant/codecs/int8_convrot.py, convrot_w4a4.py and asym_w4a8_int8.py say; the rotation is
that of rotation.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels.fields import Kernel, Parts

__all__ = ["KERNELS"]


def rotated(weight: Tensor, group: int) -> Tensor:
    """Rotate groups of every row, factor by factor: (R, K) -> (R, K)."""
    shape, stride = weight.shape, 1
    while stride < group:
        a, b, c, d = weight.reshape(shape[0], -1, 4, stride).unbind(2)
        first, second, fourth = a + b, c - d, c + d
        # b - a and not -(a - b): where both are equal, the sign of zero is the codecs'
        turned = (first + second, first - second, a - b + fourth, b - a + fourth)
        weight = torch.stack(turned, dim=2) * 0.5
        stride *= 4
    return weight.reshape(shape)


def _nibbles(packed: Tensor) -> Tensor:
    """Codes 0-15 of packed bytes, low nibble first: (R, K / 2) -> (R, K)."""
    code = packed.view(torch.uint8)
    return torch.stack((code & 15, code >> 4), dim=2).flatten(1)


def _int8(group: int, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    weight = parts["weight"].reshape(shape).float() * parts["scale"].float().reshape(-1, 1)
    return rotated(weight, group).to(dtype)


def _w4a4(group: int, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    code = _nibbles(parts["weight"].reshape(shape[0], -1)).to(torch.int8)
    level = torch.where(code > 7, code - 16, code).float()
    return rotated(level * parts["scale"].float().reshape(-1, 1), group).to(dtype)


def _w4a8(group: int, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    code = _nibbles(parts["weight"].reshape(shape[0], -1)).int()
    step = parts["s_rel"].view(torch.float8_e4m3fn).reshape(shape[0], -1, 1).float()
    value = parts["codebook"].reshape(-1)[code].reshape(shape[0], step.shape[1], -1)
    level = (value * step).round().clamp(-127, 127).reshape(shape)
    return rotated(level * parts["s_channel"].reshape(-1, 1), group).to(dtype)


_CODECS = {"int8_convrot": _int8, "convrot_w4a4": _w4a4, "asym_w4a8_int8": _w4a8}
KERNELS: Mapping[str, Kernel] = {
    row.name: functools.partial(_CODECS[row.codec], row.rotation)
    for row in FORMATS.values()
    if row.codec in _CODECS
}
