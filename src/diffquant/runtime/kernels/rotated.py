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

__all__ = ["KERNELS", "levels_of", "rotated", "rotated_by_matrix"]


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


@functools.lru_cache(maxsize=8)
def _matrix(group: int, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return rotated(torch.eye(group, device=device), group)


def rotated_by_matrix(x: Tensor, group: int) -> Tensor:
    """As `rotated` to the order of sums, by one product: (M, K) of any dtype, sums in float32."""
    if torch.compiler.is_compiling():  # a graph looks into no cache
        return rotated(x.float(), group).to(x.dtype)
    turned = x.float().reshape(-1, group) @ _matrix(group, x.device)
    return turned.reshape(x.shape).to(x.dtype)


def _nibbles(packed: Tensor) -> Tensor:
    """Codes 0-15 of packed bytes, low nibble first: (R, K / 2) -> (R, K)."""
    code = packed.view(torch.uint8)
    return torch.stack((code & 15, code >> 4), dim=2).flatten(1)


def _int8(group: int, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    weight = parts["weight"].reshape(shape).float() * parts["scale"].float().reshape(-1, 1)
    return rotated(weight, group).to(dtype)


def _signed(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    code = _nibbles(parts["weight"].reshape(shape[0], -1)).to(torch.int8)
    return torch.where(code > 7, code - 16, code).float()


def _w4a4(group: int, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    scale = parts["scale"].float().reshape(-1, 1)
    return rotated(_signed(parts, shape) * scale, group).to(dtype)


def _looked_up(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    code = _nibbles(parts["weight"].reshape(shape[0], -1)).int()
    step = parts["s_rel"].view(torch.float8_e4m3fn).reshape(shape[0], -1, 1).float()
    value = parts["codebook"].reshape(-1)[code].reshape(shape[0], step.shape[1], -1)
    return (value * step).round().clamp(-127, 127).reshape(shape)


def _w4a8(group: int, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    scale = parts["s_channel"].reshape(-1, 1)
    return rotated(_looked_up(parts, shape) * scale, group).to(dtype)


_LEVELS = {"convrot_w4a4": _signed, "asym_w4a8_int8": _looked_up}


def levels_of(codec: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """The levels of a weight of 4 bits, which its row's scale multiplies: int8 (N, K).

    A NaN, which no encoder writes, counts as 0; who multiplies levels compares with decoding first.

    Raises:
        KeyError: a codec without levels.
    """
    return _LEVELS[codec](parts, shape).nan_to_num(nan=0.0).to(torch.int8)


_CODECS = {"int8_convrot": _int8, "convrot_w4a4": _w4a4, "asym_w4a8_int8": _w4a8}
KERNELS: Mapping[str, Kernel] = {
    row.name: functools.partial(_CODECS[row.codec], row.rotation)
    for row in FORMATS.values()
    if row.codec in _CODECS
}
