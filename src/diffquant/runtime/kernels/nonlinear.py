"""The torch reference decoders of formats whose levels are looked up in a table of 16 values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffquant.quant.codecs import fp4
from diffquant.quant.codecs.arrays import Float32
from diffquant.quant.codecs.iq4_search import VALUES
from diffquant.runtime.kernels.fields import Kernel, half, of_blocks, shifted, words

__all__ = ["KERNELS"]


def _look_up(table: Float32, index: Tensor) -> Tensor:
    return torch.tensor(table, device=index.device)[index.int()]


def _nibbles(packed: Tensor, size: int) -> Tensor:
    """(B, n) bytes -> (B, 2 n / size, size): each run of size / 2 bytes, low nibbles first."""
    return shifted(packed.reshape(len(packed), -1, size // 2), (0, 4), 15).flatten(2)


def _iq4_nl(blocks: Tensor) -> Tensor:  # d f16, q[16]
    return half(blocks, 0) * _look_up(VALUES, _nibbles(blocks[:, 2:], 32)).flatten(1)


def _iq4_xs(blocks: Tensor) -> Tensor:  # d f16, upper bits of scales u16, lower bits [4], q[128]
    upper = shifted(words(blocks[:, 2:4]), tuple(range(0, 16, 2)), 3).flatten(1)  # (B, 8)
    lower = shifted(blocks[:, 4:8, None], (0, 4), 15).flatten(1)
    scale = half(blocks, 0) * ((lower | upper << 4).float() - 32)
    return scale.unsqueeze(-1) * _look_up(VALUES, _nibbles(blocks[:, 8:], 32))


def _mxfp4(blocks: Tensor) -> Tensor:  # exponent, q[16]
    scale = _look_up(fp4.E8M0_HALVES, blocks[:, :1])
    return scale * _look_up(fp4.VALUES, _nibbles(blocks[:, 1:], 32)).flatten(1)


def _nvfp4(blocks: Tensor) -> Tensor:  # scales[4], q[32]
    scale = _look_up(fp4.UE4M3_HALVES, blocks[:, :4]).unsqueeze(-1)
    return scale * _look_up(fp4.VALUES, _nibbles(blocks[:, 4:], 16))


KERNELS: Mapping[str, Kernel] = {
    "iq4_nl": of_blocks(18, _iq4_nl),
    "iq4_xs": of_blocks(136, _iq4_xs),
    "mxfp4": of_blocks(17, _mxfp4),
    "nvfp4": of_blocks(36, _nvfp4),
}
