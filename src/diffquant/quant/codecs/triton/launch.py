"""How kernels are launched: no fused multiply-add, the tensor's own device; lanes of encoders.

Counts of what there is to encode are arguments that kernels are not specialized for: Triton would
compile a kernel again where one is divisible by 16 or is 1, many seconds each.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import triton
from torch import Tensor

__all__ = ["LANES", "Lanes", "lanes", "launch", "unavailable"]

_OLDEST = 80  # compute capability 8.0: what Triton supports


class _Kernel(Protocol):
    """A function under `triton.jit`: indexed by the number of programs, then called."""

    def __getitem__(self, programs: tuple[int]) -> Callable[..., object]: ...


class Lanes(NamedTuple):
    """How many sub-blocks a program encodes side by side, a power of two from 16; how many warps.

    With 32 lanes to a warp a thread has one sub-block, whose elements stay in its registers.
    """

    number: int = 128
    warps: int = 4


# Formats that are faster with other lanes than the default: benchmarks/gpu_quantize.py --lanes.
LANES: dict[str, Lanes] = {}


def lanes(name: str) -> Lanes:
    """The lanes of a format."""
    return LANES.get(name, Lanes())


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


def unavailable() -> str:
    """Why kernels cannot run on this machine; empty if they can.

    Triton compiles its link to the driver with a C compiler and Python's headers, once.
    """
    try:
        target = triton.runtime.driver.active.get_current_target()
    except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError) as error:
        return f"triton cannot reach a card ({error})"
    if target.backend == "cuda" and target.arch < _OLDEST:
        found = f"{target.arch // 10}.{target.arch % 10}"
        return f"triton needs compute capability 8.0, this card has {found}"
    return ""
