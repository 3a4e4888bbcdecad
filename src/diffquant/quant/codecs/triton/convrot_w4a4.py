"""Encoder of convrot_w4a4: groups are rotated by a kernel, rows rounded by another.

One program is a row. Its largest magnitude is that of bits, which are ordered as magnitudes are,
NaN above infinity: the order in which a card compares does not matter.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.convrot_w4a4 import SMALLEST_ABSMAX
from diffquant.quant.codecs.triton.launch import launch
from diffquant.quant.codecs.triton.numbers import nearest_int
from diffquant.quant.codecs.triton.rotation import rotate
from diffquant.quant.formats import format_named

__all__ = ["convrot_w4a4"]

_TILE = 1024  # weights of a row at a time
_WARPS = 4
_SMALLEST = int(SMALLEST_ABSMAX.view(np.int32))  # its bits
_NAN = 0x7FC00000  # the bits of a processor's NaN; a card's has others


@triton.jit(do_not_specialize=["groups"])
def _rows(
    src,
    dst,
    scales,
    groups,
    SIZE: tl.constexpr,
    SMALLEST: tl.constexpr,
    NAN: tl.constexpr,
    TILE: tl.constexpr,
):
    # A row is `groups` times SIZE weights, so that the compiler knows how rows are aligned.
    row, columns = tl.program_id(0).to(tl.int64), groups * SIZE  # 64 bits: beyond 2**31 bytes
    src += row * columns
    dst += row * (columns // 2)
    column = tl.arange(0, TILE)
    most = tl.zeros((TILE,), tl.int32)
    for first in range(0, columns, TILE):
        x = tl.load(src + first + column, mask=first + column < columns, other=0.0)
        most = tl.maximum(most, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.maximum(tl.max(most, axis=0), SMALLEST)
    absmax = tl.minimum(bits, NAN).to(tl.float32, bitcast=True)
    scale = tl.div_rn(absmax, tl.full((), 7.0, tl.float32))
    tl.store(scales + row, tl.where(scale == scale, scale, absmax))
    # A quotient is at most 7 and a rounding, or NaN, which becomes 0.
    for first in range(0, columns, TILE):
        x = tl.load(src + first + column, mask=first + column < columns, other=0.0)
        level = nearest_int(tl.div_rn(x, tl.broadcast_to(scale, (TILE,)))) & 15
        low, high = tl.split(tl.reshape(level, (TILE // 2, 2)))
        place = first // 2 + tl.arange(0, TILE // 2)
        tl.store(dst + place, (low | high << 4).to(tl.int8), mask=place < columns // 2)


def convrot_w4a4(weight: Tensor, stats: None = None, *, fmt: str) -> dict[str, Tensor]:
    """Encode (R, K) rows, K a multiple of the format's group; see quant/backends.py."""
    del stats
    size, (rows, columns) = format_named(fmt).rotation, weight.shape
    rotated = rotate(weight, size)
    packed = torch.empty((rows, columns // 2), dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
    launch(
        _rows,
        rows,
        _WARPS,
        rotated,
        packed,
        scale,
        columns // size,
        SIZE=size,
        SMALLEST=_SMALLEST,
        NAN=_NAN,
        TILE=_TILE,
    )
    return {"weight": packed, "scale": scale}
