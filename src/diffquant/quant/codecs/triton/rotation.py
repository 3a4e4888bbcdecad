"""Groups of rows times a Hadamard matrix, as codecs/rotation.py defines it.

The rotation is done factor by factor, each on the fastest digit (base 4) of a weight's place in its
group; the digit then becomes the slowest, so that after all factors every weight is back where it
was.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.triton.launch import launch

__all__ = ["rotate", "rotation_step"]

_TILE = 2048  # weights of a program
_WARPS = 4


@triton.jit
def rotation_step(x, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """One factor, on the fastest digit, which becomes the slowest: (GROUPS, SIZE)."""
    even, odd = tl.split(tl.reshape(x, (GROUPS, SIZE // 4, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    first, second, fourth = a + b, c - d, c + d
    upper = tl.join((first + second) * 0.5, (a - b + fourth) * 0.5)
    lower = tl.join((first - second) * 0.5, (b - a + fourth) * 0.5)
    turned = tl.permute(tl.join(upper, lower), (0, 2, 3, 1))
    return tl.reshape(turned, (GROUPS, SIZE))


@triton.jit(do_not_specialize=["groups"])
def _rotate(src, dst, groups, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * GROUPS  # 64 bits: weights beyond 2**31 bytes
    row = tl.arange(0, GROUPS)
    offset = row[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    mask = (row < groups - first)[:, None]
    x = tl.load(src + first * SIZE + offset, mask=mask, other=0.0).to(tl.float32)
    for _ in tl.static_range((SIZE > 4) + (SIZE > 16) + (SIZE > 64)):
        x = rotation_step(x, GROUPS, SIZE)
    x = rotation_step(x, GROUPS, SIZE)
    tl.store(dst + first * SIZE + offset, x, mask=mask)


def rotate(weight: Tensor, size: int) -> Tensor:
    """Rotate groups of `size`, 4 ** n up to 256, of (R, K) rows; returns float32 (R, K)."""
    rotated = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    launch(
        _rotate,
        -(-weight.numel() // _TILE),
        _WARPS,
        weight,
        rotated,
        weight.numel() // size,
        GROUPS=_TILE // size,
        SIZE=size,
    )
    return rotated
