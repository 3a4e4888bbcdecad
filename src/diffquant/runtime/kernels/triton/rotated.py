"""ComfyUI's rotated integers: int8_convrot, convrot_w4a4 and asym_w4a8_int8; see rotated.py beside.

A program takes whole groups. The rotation is the encoder's, and its own inverse.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.triton.int8_convrot import rotation_step
from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels.fields import Kernel, Parts
from diffquant.runtime.kernels.reference import KERNELS as REFERENCE
from diffquant.runtime.kernels.triton.bits import at, byte, e4m3, int8, number
from diffquant.runtime.kernels.triton.launch import aligned, group, launch, tile

__all__ = ["KERNELS", "rounded"]

_STEP = 16  # weights that share an s_rel


@triton.jit
def rounded(x):
    """To whole numbers, half to even, and to +-127; NaN and the sign of 0 stay."""
    whole = (x + 12582912.0) - 12582912.0  # beyond 2**22 inexact, and cut to 127
    whole = tl.where(whole == 0.0, x * 0.0, whole)
    return tl.where(whole > 127.0, 127.0, tl.where(whole < -127.0, -127.0, whole))


@triton.jit
def _rotated(
    src,
    scale,
    step,
    book,
    dst,
    groups,
    per_row,  # groups in a row
    CODES: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * GROUPS
    turn = tl.arange(0, GROUPS)
    some = turn < groups - first
    factor = tl.load(scale + (first + turn) // per_row, mask=some, other=0).to(tl.float32)
    dst += first * SIZE
    if CODES == "int8":
        place = at(turn * SIZE, tl.arange(0, SIZE), GROUP)
        level = int8(tl.load(src + first * SIZE + place, mask=some[:, None], other=0).to(tl.int32))
    else:
        # Runs of STEP weights, two to a byte, low nibble first.
        run = tl.arange(0, GROUPS * SIZE // STEP)
        live = run < (groups - first) * (SIZE // STEP)
        place = at(run * (STEP // 2), tl.arange(0, STEP // 2), GROUP // 2)
        start = src + first * (SIZE // 2)
        packed = tl.load(start + place, mask=live[:, None], other=0).to(tl.int32)
        if CODES == "levels":
            low, high = number((packed & 15) ^ 8, 8), number(packed >> 4 ^ 8, 8)
        else:
            relative = e4m3(byte(step + first * (SIZE // STEP), run, live))[:, None]
            low = rounded(tl.load(book + (packed & 15)) * relative)
            high = rounded(tl.load(book + (packed >> 4)) * relative)
        level = tl.reshape(tl.join(low, high), (GROUPS, SIZE))
    x = level * factor[:, None]
    for _ in tl.static_range((SIZE > 4) + (SIZE > 16) + (SIZE > 64)):
        x = rotation_step(x, GROUPS, SIZE)
    x = rotation_step(x, GROUPS, SIZE)
    offset = turn[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(dst + offset, x.to(dst.dtype.element_ty), mask=some[:, None])


# Codec: how codes are read, and the name of a row's scale.
_CODECS = {
    "int8_convrot": ("int8", "scale"),
    "convrot_w4a4": ("levels", "scale"),
    "asym_w4a8_int8": ("book", "s_channel"),
}


def _decode(name: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    row = FORMATS[name]
    codes, part = _CODECS[row.codec]
    rows, columns = shape
    stored, scale, count = parts["weight"], parts[part], math.prod(shape)
    nbytes = count if codes == "int8" else count // 2
    if stored.numel() != nbytes or scale.numel() != rows or columns % row.rotation:
        return REFERENCE[name](parts, shape, dtype)
    weight = aligned(stored).view(torch.uint8)
    step, book = parts.get("s_rel", weight), parts.get("codebook", scale)
    if codes == "book" and (step.numel() * _STEP, book.dtype) != (count, torch.float32):
        return REFERENCE[name](parts, shape, dtype)
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    groups, (weights, warps) = count // row.rotation, tile(name)
    launch(
        _rotated,
        -(-count // weights),
        warps,
        weight,
        aligned(scale),
        aligned(step).view(torch.uint8),
        aligned(book),
        out,
        groups,
        columns // row.rotation,
        CODES=codes,
        GROUPS=weights // row.rotation,
        SIZE=row.rotation,
        STEP=_STEP,
        GROUP=group(dtype),
    )
    return out


KERNELS: Mapping[str, Kernel] = {
    row.name: functools.partial(_decode, row.name)
    for row in FORMATS.values()
    if row.codec in _CODECS
}
