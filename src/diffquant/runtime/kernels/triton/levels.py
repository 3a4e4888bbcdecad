"""The int8 levels of ComfyUI's rotated weights of 4 bits, without their row's scale; see rows.py.

They are what an int8 product takes. Unpacked beforehand and not in the product itself: there every
tile of 128 rows of activations would look the same codes up again, 36 times for 4608 tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels.fields import Parts
from diffquant.runtime.kernels.rows import levels as reference
from diffquant.runtime.kernels.triton.bits import e4m3
from diffquant.runtime.kernels.triton.launch import aligned, launch
from diffquant.runtime.kernels.triton.rotated import rounded

__all__ = ["levels"]

_STEP = 16  # weights that share an s_rel
_BYTES = 1024  # of a program


@triton.jit
def _levels(src, step, book, dst, nbytes, LOOKED_UP: tl.constexpr, STEP: tl.constexpr,
            BYTES: tl.constexpr):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BYTES
    place = tl.arange(0, BYTES)
    mask = place < nbytes - first
    packed = tl.load(src + first + place, mask=mask, other=0).to(tl.int32)
    if LOOKED_UP:
        code = tl.load(step + (first + place) // (STEP // 2), mask=mask, other=0)
        relative = e4m3(code.to(tl.int32))
        relative = tl.where(relative == relative, relative, 0.0)  # NaN
        low = rounded(tl.load(book + (packed & 15)) * relative).to(tl.int8)
        high = rounded(tl.load(book + (packed >> 4)) * relative).to(tl.int8)
    else:
        low = (((packed & 15) ^ 8) - 8).to(tl.int8)
        high = ((packed >> 4 ^ 8) - 8).to(tl.int8)
    both = tl.reshape(tl.join(low, high), (2 * BYTES,))
    wide = tl.arange(0, 2 * BYTES)
    tl.store(dst + 2 * first + wide, both, mask=wide < 2 * (nbytes - first))


def levels(fmt: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """See rows.levels."""
    stored, count = parts["weight"], math.prod(shape)
    looked_up = FORMATS[fmt].codec == "asym_w4a8_int8"
    step, book = parts.get("s_rel", stored), parts.get("codebook", stored)
    if stored.numel() * 2 != count or (
        looked_up and (step.numel() * _STEP, book.dtype) != (count, torch.float32)
    ):
        return reference(fmt, parts, shape)
    weight = aligned(stored).view(torch.uint8)
    out = torch.empty(shape, dtype=torch.int8, device=weight.device)
    launch(
        _levels,
        -(-stored.numel() // _BYTES),
        4,
        weight,
        aligned(step).view(torch.uint8),
        aligned(book),
        out,
        stored.numel(),
        LOOKED_UP=looked_up,
        STEP=_STEP,
        BYTES=_BYTES,
    )
    return out
