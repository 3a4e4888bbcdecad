"""ComfyUI's mxfp8 and nvfp4: scales in tiles of 128 rows by 4 blocks; quant/codecs/swizzle.py.

A run is a block of a row. What is stored as padding is not read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffquant.runtime.kernels.fields import Kernel, Parts
from diffquant.runtime.kernels.reference import KERNELS as REFERENCE
from diffquant.runtime.kernels.triton.bits import at, byte, e2m1, e4m3
from diffquant.runtime.kernels.triton.launch import aligned, group, launch, tile

__all__ = ["KERNELS"]

_WIDTHS = {"mxfp8": 32, "nvfp4_comfy": 16}


@triton.jit
def _tiled(
    src,
    block_scale,
    tensor_scale,
    dst,
    rows,
    columns,
    stride,  # stored bytes in a row
    tiles,  # tiles of scales beside each other
    FOUR_BITS: tl.constexpr,
    RUNS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    across = (columns + WIDTH - 1) // WIDTH
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    row = run // across
    some = row < rows
    block = (run - row * across).to(tl.int32)
    tile = row // 128 * tiles + block // 4
    within = row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    code = byte(block_scale, tile * 512 + within, some)
    column = tl.arange(0, WIDTH)
    kind = dst.dtype.element_ty
    if FOUR_BITS:
        scale = e4m3(code) * tl.load(tensor_scale)
        place = at(row * stride + block * (WIDTH // 2), tl.arange(0, WIDTH // 2), GROUP // 2)
        packed = tl.load(src + place, mask=some[:, None], other=0).to(tl.int32)
        high = (e2m1(packed >> 4) * scale[:, None]).to(kind)
        low = (e2m1(packed & 15) * scale[:, None]).to(kind)
        value = tl.reshape(tl.join(high, low), (RUNS, WIDTH))
    else:
        scale = (code << 23).to(tl.float32, bitcast=True)  # 2 ** (code - 127), and 0 for 0
        scale = tl.where(code == 255, float("nan"), scale)
        place = at(row * stride + block * WIDTH, column, GROUP)
        packed = tl.load(src + place, mask=some[:, None], other=0).to(tl.int32)
        value = (e4m3(packed) * scale[:, None]).to(kind)
    inside = (block * WIDTH)[:, None] + column[None, :]
    mask = some[:, None] & (inside < columns)
    tl.store(dst + (row * columns)[:, None] + inside, value, mask=mask)


def _fits(stored: Tensor, scales: Tensor, rows: int, blocks: int, nbytes: int) -> bool:
    """Whether `rows` of so many blocks of `nbytes` are stored, and whole tiles of their scales."""
    if stored.ndim != 2 or scales.ndim != 2 or scales.dtype.itemsize != 1:
        return False
    whole = scales.shape[0] % 128 == 0 and scales.shape[1] % 4 == 0
    return (
        whole
        and stored.shape[0] >= rows
        and stored.shape[1] >= blocks * nbytes
        and scales.shape[0] >= rows
        and scales.shape[1] >= blocks
    )


def _decode(name: str, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    width, four_bits = _WIDTHS[name], name == "nvfp4_comfy"
    rows, columns = shape
    stored, scales = parts["weight"], parts["block_scale"]
    tensor_scale = parts.get("tensor_scale", scales)
    if four_bits and (tensor_scale.dtype, tensor_scale.numel()) != (torch.float32, 1):
        return REFERENCE[name](parts, shape, dtype)
    across, (weights, warps) = -(-columns // width), tile(name)
    if not _fits(stored, scales, rows, across, width // 2 if four_bits else width):
        return REFERENCE[name](parts, shape, dtype)
    weight = aligned(stored).view(torch.uint8)
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    launch(
        _tiled,
        -(-rows * across * width // weights),
        warps,
        weight,
        aligned(scales).view(torch.uint8),
        aligned(tensor_scale),
        out,
        rows,
        columns,
        stored.shape[1],
        scales.shape[1] // 4,
        FOUR_BITS=four_bits,
        RUNS=weights // width,
        WIDTH=width,
        GROUP=group(dtype),
    )
    return out


KERNELS: Mapping[str, Kernel] = {name: functools.partial(_decode, name) for name in _WIDTHS}
