"""Decoders for a GPU, in Triton: packed bytes are read once, the compute dtype is written once.

What bounds a decoder on a card is its memory, so each is one kernel: no float32 copy, no unpacked
codes. A program decodes a tile of whole runs (weights that share a scale) in the order in which
they are stored, with loads and stores as wide as the block's size allows (bits.py says how). The
numbers are the reference's, bit for bit in float32, and rounded once, half to even: products and
sums are kept apart (launch.py) and follow the reference's order. Parts that are not laid out as
FORMATS says are the reference's.

A result is a new tensor. torch's allocator for cards hands out a freed block again at once, in
stream order, so there is nothing to gain from a buffer of our own (as scratch.py has for the CPU).

Plain casts (f32, f16, bf16, fp8 without a scale) are not here: torch does them in one pass.

The modules import triton; kernels/table.py loads them when a weight on a card is first decoded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from diffquant.quant.codecs.triton.launch import unavailable
from diffquant.runtime.kernels.fields import Kernel
from diffquant.runtime.kernels.triton import (
    blocks_32,
    blocks_k,
    flat,
    grids,
    rotated,
    scaled,
    ternary,
    tiled,
)

__all__ = ["CASTS", "DTYPES", "KERNELS", "unavailable"]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
CASTS = frozenset({"f32", "f16", "bf16", "fp8_e4m3", "fp8_e5m2"})
KERNELS: Mapping[str, Kernel] = {
    **blocks_32.KERNELS,
    **blocks_k.KERNELS,
    **grids.KERNELS,
    **ternary.KERNELS,
    **flat.KERNELS,
    **scaled.KERNELS,
    **tiled.KERNELS,
    **rotated.KERNELS,
}
