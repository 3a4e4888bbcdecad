"""The torch reference decoders of formats whose levels are -1, 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffquant.quant.codecs.grids import grid
from diffquant.quant.codecs.tq1_0 import RUNS
from diffquant.runtime.kernels.fields import Kernel, half, of_blocks, shifted, words

__all__ = ["KERNELS"]


def _vectors(index: Tensor, negative: Tensor, scale: Tensor) -> Tensor:
    """Vectors of eight, (B, 32, 8): `scale * (grid[index] + 1/8)`, or - 1/8 where negative."""
    table = torch.tensor(grid("iq1_s"), device=index.device)  # IQ1_M has the same
    shift = torch.where(negative.bool(), -0.125, 0.125).float()
    return scale.unsqueeze(-1) * (table[index] + shift.unsqueeze(-1))


def _iq1_s(blocks: Tensor) -> Tensor:  # d f16, index[32], u16[8]: upper bits, scale, sign
    word = words(blocks[:, 34:])  # (B, 8)
    upper = shifted(word[:, :, None], (0, 3, 6, 9), 7).flatten(1)  # (B, 32)
    scale = half(blocks, 0) * (2 * (word >> 12 & 7) + 1).float()
    each = (word >> 15).repeat_interleave(4, 1), scale.repeat_interleave(4, 1)
    return _vectors(blocks[:, 2:34].int() | upper << 8, *each)


def _iq1_m(blocks: Tensor) -> Tensor:  # index[32], nibbles[16]: upper bits, sign; u16[4]: scales, d
    word = words(blocks[:, 48:])  # (B, 4)
    quarters = (blocks[:, 49::2] >> 4).reshape(-1, 2, 2)
    d = half(quarters[:, :, 0] | quarters[:, :, 1] << 4, 0)
    scale = d * (2 * shifted(word[:, :, None], (0, 3, 6, 9), 7).flatten(1) + 1).float()  # (B, 16)
    nibble = shifted(blocks[:, 32:48, None], (0, 4), 15).flatten(1).int()  # (B, 32)
    index = blocks[:, :32].int() | (nibble & 7) << 8
    return _vectors(index, nibble >> 3, scale.repeat_interleave(2, 1))


def _tq1_0(blocks: Tensor) -> Tensor:  # q[48] of five digits, q[4] of four, d f16
    digits = []
    for start, width, count in RUNS:
        power = torch.tensor([3**n for n in range(count)], device=blocks.device)[:, None]
        fraction = blocks[:, None, start : start + width].int() * power & 255
        digits.append((fraction * 3 >> 8).flatten(1))
    return half(blocks, 52) * (torch.cat(digits, 1).float() - 1)


def _tq2_0(blocks: Tensor) -> Tensor:  # q[64], d f16
    level = shifted(blocks[:, :64].reshape(-1, 2, 32), (0, 2, 4, 6), 3).flatten(1)
    return half(blocks, 64) * (level.float() - 1)


KERNELS: Mapping[str, Kernel] = {
    "iq1_s": of_blocks(50, _iq1_s),
    "iq1_m": of_blocks(56, _iq1_m),
    "tq1_0": of_blocks(54, _tq1_0),
    "tq2_0": of_blocks(66, _tq2_0),
}
