"""Triton decoders (draft)."""
from __future__ import annotations
from collections.abc import Mapping
import torch
from diffquant.runtime.kernels.fields import Kernel
from diffquant.runtime.kernels.triton import blocks_32, blocks_k, flat, grids, rotated, scaled, ternary, tiled
__all__ = ["DTYPES", "KERNELS"]
DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
KERNELS: Mapping[str, Kernel] = {**blocks_32.KERNELS, **blocks_k.KERNELS, **flat.KERNELS, **scaled.KERNELS, **grids.KERNELS, **ternary.KERNELS, **tiled.KERNELS, **rotated.KERNELS}
