"""Encoder of int8_convrot: groups are rotated by a kernel, rows rounded by torch.

As in codecs/int8_convrot.py: the rotation is done factor by factor, each on the fastest digit
(base 4) of a weight's place in its group; the digit then becomes the slowest, so that after all
factors every weight is back where it was.

What follows is a largest magnitude, a division and a rounding per row. torch's operations on a card
are exact ones, one kernel each; but a division by a number of the host multiplies by its inverse
there, so divisors are tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.int8_rowwise import SMALLEST_SCALE
from diffquant.quant.codecs.triton.launch import launch
from diffquant.quant.formats import format_named

__all__ = ["int8_convrot", "rotation_step"]

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


def int8_convrot(weight: Tensor, stats: None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of the format's group; see quant/backends.py."""
    del stats
    size = format_named(fmt).rotation
    groups = weight.numel() // size
    rotated = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    launch(
        _rotate,
        -(-weight.numel() // _TILE),
        _WARPS,
        weight,
        rotated,
        groups,
        GROUPS=_TILE // size,
        SIZE=size,
    )
    if not weight.numel():
        absmax = torch.zeros((len(weight), 1), device=weight.device)
    else:
        absmax = rotated.abs().amax(dim=1, keepdim=True)
    scale = (absmax / torch.full_like(absmax, 127)).clamp_min(float(SMALLEST_SCALE))  # (R, 1)
    level = (rotated / scale).round_()  # half to even, at most 127
    return {"weight": level.to(torch.int8), "scale": scale}
