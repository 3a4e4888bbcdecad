"""ComfyUI's rotated integers: int8_convrot, convrot_w4a4 and asym_w4a8_int8; see rotated.py beside.

The rotation is the encoder's, and its own inverse: a factor for each digit (base 4) of a weight's
place in its group, the fastest first. A thread has vectors of 16 weights, two digits, in registers:

    16    one vector is a group
    64    two digits of 16 neighbours, an exchange, the third digit of four neighbours
    256   two digits of 16 neighbours, an exchange, two digits of every 16th weight

So a weight goes through shared memory once at most, where factor by factor it went four times.
Sums are the reference's, number by number: tensor cores would add in another order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels.fields import Kernel, Parts
from diffquant.runtime.kernels.reference import KERNELS as REFERENCE
from diffquant.runtime.kernels.triton.bits import byte, e4m3, number
from diffquant.runtime.kernels.triton.launch import aligned, launch, tile

__all__ = ["KERNELS", "rounded"]

_STEP = 16  # weights that share an s_rel, and those of a vector


@triton.jit
def rounded(x):
    """To whole numbers, half to even, and to +-127; NaN and the sign of 0 stay."""
    whole = (x + 12582912.0) - 12582912.0  # beyond 2**22 inexact, and cut to 127
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    whole = (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.clamp(whole, -127.0, 127.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _factor(a, b, c, d):
    """One factor on the four values of a digit."""
    first, second, fourth = a + b, c - d, c + d
    upper, third = (first + second) * 0.5, (a - b + fourth) * 0.5
    # b - a and not -(a - b): where both are equal, the sign of zero is the codecs'
    return upper, (first - second) * 0.5, third, (b - a + fourth) * 0.5


@triton.jit
def _fast_digit(x):
    """The factor on the lower digit of 16 places."""
    turned = ()
    for i in tl.static_range(4):
        turned += _factor(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3])
    return turned


@triton.jit
def _slow_digit(x):
    """The factor on the upper digit of 16 places."""
    turned, found = (), ()
    for i in tl.static_range(4):
        turned += _factor(x[i], x[i + 4], x[i + 8], x[i + 12])
    for i in tl.static_range(16):
        found += (turned[i % 4 * 4 + i // 4],)
    return found


@triton.jit
def _joined(x, COUNT: tl.constexpr, BITS: tl.constexpr):
    """COUNT = 2 ** BITS vectors side by side: (vectors, 2, 2, ...), the last digit the fastest."""
    parts = x
    for n in tl.static_range(BITS):
        wider = ()
        for i in tl.static_range(COUNT >> n + 1):
            wider += (tl.join(parts[i], parts[i + (COUNT >> n + 1)]),)
        parts = wider
    return parts[0]


@triton.jit
def _split(x):
    """(vectors, 2, 2, 2, 2) taken apart: 16 of (vectors,)."""
    parts = (x,)
    for n in tl.static_range(4):
        lower, upper = (), ()
        for i in tl.static_range(1 << n):
            low, high = tl.split(parts[i])
            lower += (low,)
            upper += (high,)
        parts = lower + upper
    return parts


@triton.jit
def _rotated(
    src,
    scale,
    step,
    book,
    dst,
    vectors,
    per_row,  # vectors in a row
    CODES: tl.constexpr,
    VECTORS: tl.constexpr,
    SIZE: tl.constexpr,
):
    place = tl.program_id(0) * VECTORS + tl.arange(0, VECTORS)  # 32 bits: up to 2**35 weights
    some = place < vectors
    factor = tl.load(scale + place // per_row, mask=some, other=0).to(tl.float32)
    vector = tl.arange(0, VECTORS)
    first = tl.program_id(0).to(tl.int64) * VECTORS
    dst += first * 16
    bits: tl.constexpr = 8 if CODES == "int8" else 4
    words: tl.constexpr = bits // 2  # of 32 bits in a vector
    source = src.to(tl.pointer_type(tl.int32), bitcast=True) + first * words
    if CODES == "book":
        relative = e4m3(byte(step + first, vector, some))
    x = ()
    for i in tl.static_range(words):
        word = tl.load(source + vector * words + i, mask=some, other=0)
        if CODES == "int8":
            word ^= -2139062144  # 0x80 in each byte
        if CODES == "levels":
            word ^= -2004318072  # 8 in each nibble
        for j in tl.static_range(32 // bits):
            code = word >> bits * j & ((1 << bits) - 1)
            if CODES == "book":
                level = rounded(tl.load(book + code) * relative)
            else:
                level = number(code, 1 << bits - 1)
            x += (level * factor,)
    x = _slow_digit(_fast_digit(x))
    if SIZE > 16:
        # Bits of a vector's place in its group change places with bits of a place in the vector.
        wide = _joined(x, 16, 4)
        if SIZE == 64:
            wide = tl.reshape(wide, (VECTORS // 4, 2, 2, 2, 2, 2, 2))
            wide = tl.permute(wide, (0, 3, 4, 1, 2, 5, 6))
        else:
            wide = tl.reshape(wide, (VECTORS // 16, 2, 2, 2, 2, 2, 2, 2, 2))
            wide = tl.permute(wide, (0, 5, 6, 7, 8, 1, 2, 3, 4))
        x = _split(tl.reshape(wide, (VECTORS, 2, 2, 2, 2)))
        if SIZE == 256:
            x = _fast_digit(x)
        x = _slow_digit(x)
    kind = dst.dtype.element_ty
    if SIZE == 256:
        start = vector // 16 * 256 + vector % 16
        for i in tl.static_range(16):
            tl.store(dst + i * 16 + start, x[i].to(kind), mask=some)
    else:
        beside: tl.constexpr = 4 if SIZE == 64 else 8  # neighbours of a thread
        stride: tl.constexpr = 16 if SIZE == 64 else 8
        start = vector // 4 * 64 + vector % 4 * 4 if SIZE == 64 else vector * 16
        offset = start[:, None] + tl.arange(0, beside)[None, :]
        for i in tl.static_range(16 // beside):
            near = ()
            for j in tl.static_range(beside):
                near += (x[i * beside + j].to(kind),)
            value = tl.reshape(_joined(near, beside, 2 if SIZE == 64 else 3), (VECTORS, beside))
            tl.store(dst + i * stride + offset, value, mask=some[:, None])


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
    weights, warps = tile(name)
    launch(
        _rotated,
        -(-count // weights),
        warps,
        weight,
        aligned(scale),
        aligned(step).view(torch.uint8),
        aligned(book),
        out,
        count // _STEP,
        columns // _STEP,
        CODES=codes,
        VECTORS=weights // _STEP,
        SIZE=row.rotation,
    )
    return out


KERNELS: Mapping[str, Kernel] = {
    row.name: functools.partial(_decode, row.name)
    for row in FORMATS.values()
    if row.codec in _CODECS
}
