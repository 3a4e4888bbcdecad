"""How kernels are launched: tile, warps, no fused multiply-add, the tensor's own device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["TILE", "WARPS", "group", "launch"]

TILE = 2048  # weights a program decodes
WARPS = 4


def group(dtype: torch.dtype) -> int:
    """How many results of `dtype` a thread writes at once: 16 bytes."""
    return 16 // dtype.itemsize


def launch(kernel: Any, count: int, weight: Tensor, *args: Any, **constants: Any) -> None:
    """Run `kernel` on tiles of TILE weights out of `count`.

    A product and a sum are rounded one after the other, as the reference rounds them: the
    compiler must not fuse them.
    """
    if not count:
        return
    here = torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext()
    with here:
        kernel[(-(-count // TILE),)](
            weight, *args, **constants, num_warps=WARPS, enable_fp_fusion=False
        )
