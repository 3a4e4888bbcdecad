"""How kernels are launched: tile, warps, no fused multiply-add, the tensor's own device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["TILES", "Tile", "aligned", "group", "launch", "tile"]

_WIDEST = 16  # bytes of the widest load


class _Kernel(Protocol):
    """A function under `triton.jit`: indexed by the number of programs, then called."""

    def __getitem__(self, programs: tuple[int]) -> Callable[..., object]: ...


class Tile(NamedTuple):
    """What a program takes: how many weights, a power of two from 512 on, and how many warps."""

    weights: int = 2048
    warps: int = 4


# Formats that are faster with another tile than the default: benchmarks/gpu_kernels.py --sweep.
TILES: dict[str, Tile] = {}


def tile(name: str) -> Tile:
    """The tile of a format."""
    return TILES.get(name, Tile())


def group(dtype: torch.dtype) -> int:
    """How many results of `dtype` a thread writes at once: 16 bytes."""
    return 16 // dtype.itemsize


def aligned(part: Tensor) -> Tensor:
    """A part in one piece that begins where the widest loads may; nearly all do and are not copied.

    One way to be aligned means one compiled kernel, and 16-bit loads that are always allowed.
    """
    part = part.contiguous()
    return part.clone() if part.data_ptr() % _WIDEST else part


def launch(
    kernel: _Kernel,
    programs: int,
    warps: int,
    weight: Tensor,
    *args: Tensor | float,
    **constants: object,
) -> None:
    """Run `programs` programs of `kernel` on the device of `weight`, its first argument.

    A product and a sum are rounded one after the other, as the reference rounds them: the
    compiler must not fuse them.
    """
    if not programs:
        return
    here = torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext()
    with here:
        kernel[(programs,)](weight, *args, **constants, num_warps=warps, enable_fp_fusion=False)
