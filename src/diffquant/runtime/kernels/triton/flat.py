"""bitsandbytes' 4-bit blocks of 64 of the flattened weight: nf4, fp4, and with quantized absmax."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.quant.codecs.double_quant import NESTED_BLOCK
from diffquant.quant.codecs.flat_blocks import BLOCK_SIZE
from diffquant.runtime.kernels.fields import Kernel, Parts
from diffquant.runtime.kernels.reference import KERNELS as REFERENCE
from diffquant.runtime.kernels.triton.bits import at, byte
from diffquant.runtime.kernels.triton.launch import aligned, group, launch, tile
from diffquant.runtime.kernels.triton.tables import on_device

__all__ = ["KERNELS"]


@triton.jit
def _four_bits(
    src,
    absmax,
    nested,
    offset,
    book,
    dynamic,
    dst,
    count,
    nbytes,
    DOUBLE: tl.constexpr,
    BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    GROUP: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    left = count - first * SIZE  # weights
    src += first * (SIZE // 2)
    dst += first * SIZE
    block = tl.arange(0, BLOCKS)
    some = block * SIZE < left
    if DOUBLE:
        code = byte(absmax + first, block, some)
        within = tl.load(nested + (first + block) // NESTED, mask=some, other=0)
        scale = tl.load(dynamic + code) * within + tl.load(offset)
    else:
        scale = tl.load(absmax + first + block, mask=some, other=0)
    place = at(block * (SIZE // 2), tl.arange(0, SIZE // 2), GROUP // 2)
    packed = tl.load(src + place, mask=place < nbytes - first * (SIZE // 2), other=0).to(tl.int32)
    kind = dst.dtype.element_ty
    high = (tl.load(book + (packed >> 4)) * scale[:, None]).to(kind)
    low = (tl.load(book + (packed & 15)) * scale[:, None]).to(kind)
    value = tl.reshape(tl.join(high, low), (BLOCKS, SIZE))
    offsets = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(dst + offsets, value, mask=offsets < left)


def _decode(name: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    blocks, double = -(-count // BLOCK_SIZE), name.endswith("_dq")
    wanted = {"weight": (torch.uint8, -(-count // 2))}
    wanted["absmax"] = (torch.uint8 if double else torch.float32, blocks)
    if double:
        wanted["nested_absmax"] = (torch.float32, -(-blocks // NESTED_BLOCK))
        wanted["nested_offset"] = (torch.float32, 1)
    if {key: (part.dtype, part.numel()) for key, part in parts.items()} != wanted:
        return REFERENCE[name](parts, shape, dtype)
    weight, absmax = aligned(parts["weight"]), aligned(parts["absmax"])
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    weights, warps = tile(name)
    launch(
        _four_bits,
        -(-count // weights),
        warps,
        weight,
        absmax,
        aligned(parts["nested_absmax"]) if double else absmax,
        aligned(parts["nested_offset"]) if double else absmax,
        on_device(name.removesuffix("_dq"), weight.device),
        on_device("dynamic", weight.device),
        out,
        count,
        weight.numel(),
        DOUBLE=double,
        BLOCKS=weights // BLOCK_SIZE,
        SIZE=BLOCK_SIZE,
        NESTED=NESTED_BLOCK,
        GROUP=group(dtype),
    )
    return out


KERNELS: Mapping[str, Kernel] = {
    name: functools.partial(_decode, name) for name in ("nf4", "nf4_dq", "fp4", "fp4_dq")
}
