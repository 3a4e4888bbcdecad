"""Encoder of int8_convrot: groups are rotated by a kernel, rows rounded by torch.

What follows the rotation is a largest magnitude, a division and a rounding per row. torch's
operations on a card are exact ones, one kernel each; but a division by a number of the host
multiplies by its inverse there, so divisors are tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffquant.quant.codecs.int8_rowwise import SMALLEST_SCALE
from diffquant.quant.codecs.triton.rotation import rotate
from diffquant.quant.formats import format_named

__all__ = ["int8_convrot"]


def int8_convrot(weight: Tensor, stats: None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of the format's group; see quant/backends.py."""
    del stats
    rotated = rotate(weight, format_named(fmt).rotation)
    if not weight.numel():
        absmax = torch.zeros((len(weight), 1), device=weight.device)
    else:
        absmax = rotated.abs().amax(dim=1, keepdim=True)
    scale = (absmax / torch.full_like(absmax, 127)).clamp_min(float(SMALLEST_SCALE))  # (R, 1)
    level = (rotated / scale).round_()  # half to even, at most 127
    return {"weight": level.to(torch.int8), "scale": scale}
