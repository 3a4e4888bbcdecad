"""The torch reference decoders of the IQ2 and IQ3 formats: scale, grid point, signs.

Layouts are drawn in quant/codecs/iq2_xxs.py and its siblings. Source: ggml-quants.c
dequantize_row_iq2_xxs, _iq2_xs, _iq2_s, _iq3_xxs, _iq3_s, ggml-org/llama.cpp@01243c5.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from diffquant.quant.codecs.grids import even_signs, grid
from diffquant.runtime.kernels.fields import Kernel, half, of_blocks, words

__all__ = ["KERNELS"]

_SIGN_BITS = 7  # stored of eight; the eighth makes the count of minus signs even


@cache
def _grid(name: str, device: torch.device) -> Tensor:
    return torch.tensor(grid(name), device=device)


@cache
def _even_signs(device: torch.device) -> Tensor:
    return torch.tensor(even_signs(), device=device)


def _bits(packed: Tensor, width: int) -> Tensor:
    """Fields of `width` bits from the lowest up: (..., n) bytes to int32 (..., n * 8 / width)."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    fields = (packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
    return fields.flatten(-2).int()


def _expand(name: str, d: Tensor, point: Tensor, signs: Tensor) -> Tensor:
    """Weights (B, 256).

    Args:
        name: format.
        d: (B, sub-blocks) float32.
        point: (B, 64 or 32) indices.
        signs: (B, 32) bytes, bit j for weight j of eight.
    """
    magnitude = _grid(name, point.device)[point.long()].reshape(*d.shape, -1)
    weight = (d.unsqueeze(-1) * magnitude).reshape(len(d), -1)
    return torch.where(_bits(signs, 1) == 1, -weight, weight)


def _words_of_signs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight words of 4 x 7 signs and a scale: signs (B, 32) bytes, scales float32 (B, 8)."""
    low, high = words(packed).reshape(len(packed), 8, 2).long().unbind(2)
    word = low | high << 16  # (B, 8)
    shifts = torch.arange(0, 4 * _SIGN_BITS, _SIGN_BITS, device=packed.device)
    seven = (word.unsqueeze(-1) >> shifts) & 127
    return _even_signs(packed.device)[seven].flatten(1), (word >> 28).float()


def _iq2_xxs(blocks: Tensor) -> Tensor:  # d f16, 8 x (4 indices u8, u32 signs and scale)
    groups = blocks[:, 2:].reshape(-1, 8, 8)
    signs, scales = _words_of_signs(groups[:, :, 4:].reshape(-1, 32))
    d = half(blocks, 0) * (0.5 + scales) * 0.25
    return _expand("iq2_xxs", d, groups[:, :, :4].reshape(-1, 32), signs)


def _iq2_xs(blocks: Tensor) -> Tensor:  # d f16, 32 u16 (index, signs << 9), scales[8]
    word = words(blocks[:, 2:66])
    d = half(blocks, 0) * (0.5 + _bits(blocks[:, 66:], 4).float()) * 0.25
    return _expand("iq2_xs", d, word & 511, _even_signs(blocks.device)[(word >> 9).long()])


def _iq2_s(blocks: Tensor) -> Tensor:  # d f16, qs[32], signs[32], qh[8], scales[8]
    d = half(blocks, 0) * (0.5 + _bits(blocks[:, 74:], 4).float()) * 0.25
    point = blocks[:, 2:34].int() | (_bits(blocks[:, 66:74], 2) << 8)
    return _expand("iq2_s", d, point, blocks[:, 34:66])


def _iq3_xxs(blocks: Tensor) -> Tensor:  # d f16, qs[64], 8 u32 signs and scale
    signs, scales = _words_of_signs(blocks[:, 66:])
    return _expand("iq3_xxs", half(blocks, 0) * (0.5 + scales) * 0.5, blocks[:, 2:66], signs)


def _iq3_s(blocks: Tensor) -> Tensor:  # d f16, qs[64], qh[8], signs[32], scales[4]
    d = half(blocks, 0) * (1 + 2 * _bits(blocks[:, 106:], 4).float())
    point = blocks[:, 2:66].int() | (_bits(blocks[:, 66:74], 1) << 8)
    return _expand("iq3_s", d, point, blocks[:, 74:106])


KERNELS: Mapping[str, Kernel] = {
    "iq3_s": of_blocks(110, _iq3_s),
    "iq3_xxs": of_blocks(98, _iq3_xxs),
    "iq2_s": of_blocks(82, _iq2_s),
    "iq2_xs": of_blocks(74, _iq2_xs),
    "iq2_xxs": of_blocks(66, _iq2_xxs),
}
