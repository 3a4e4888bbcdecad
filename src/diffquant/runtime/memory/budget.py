"""How much memory a run may take: what was asked for, else what is free."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from diffquant.convert.footprint.levels import CONTEXT_NBYTES
from diffquant.core.errors import UsageError
from diffquant.core.limits import limits
from diffquant.runtime.memory.plan import Budget

__all__ = ["Asked", "available", "capped"]

_HOST_SHARE = 0.8  # of free RAM beside a device: page-locked memory cannot be swapped out
_LARGEST_CONTEXT = 1 << 30
_GROWTH = 128 << 20  # kernels that are loaded when they are first called; 80 MiB were seen
_SPLIT = "PYTORCH_CUDA_ALLOC_CONF"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user says about memory.

    Attributes:
        vram: bytes of the device, None: what is free.
        ram: bytes of host memory, None: what is free.
        offload: a level, or auto.
        decoder: a way to decode, or auto.
    """

    vram: int | None = None
    ram: int | None = None
    offload: str = "auto"
    decoder: str = "auto"


def available(device: torch.device, asked: Asked) -> Budget:
    """The budget on a device: the smaller of what was asked for and what there is.

    What is free does not count what this process took for itself, so its context is added.

    Raises:
        UsageError: device memory is asked for where the device has none of its own.
    """
    host = _free_ram()
    if device.type == "cpu":
        if asked.vram is not None:
            raise UsageError("--vram is memory of a GPU: on the CPU use --ram")
        free = host + CONTEXT_NBYTES["cpu"]
        return Budget(ram=free if asked.ram is None else asked.ram)
    ram = int(host * _HOST_SHARE) if asked.ram is None else asked.ram
    if device.type == "cuda":
        own = _context_nbytes(device)
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        there = min(free + held + own, total)
        return Budget(there if asked.vram is None else min(asked.vram, there), ram, own)
    there = torch.mps.recommended_max_memory()  # of one memory for both
    return Budget(there if asked.vram is None else min(asked.vram, there), ram)


def _context_nbytes(device: torch.device) -> int:
    """What this process takes of a card beside its tensors, once its libraries are loaded.

    The driver does not say; it is what is used and not ours. Other processes count as well, so no
    more than a GiB of it is believed: 0.7 on an H100 (docs/lab-log.md).
    """
    one = torch.ones(1, 16, 16, 16, dtype=torch.float16, device=device)
    torch.nn.functional.conv2d(one, one.expand(16, -1, -1, -1)[..., :3, :3])
    one.reshape(64, 64).mm(one.reshape(64, 64))
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    used = total - free - torch.cuda.memory_reserved(device)
    return min(max(used + _GROWTH, CONTEXT_NBYTES["cuda"]), _LARGEST_CONTEXT)


def _free_ram() -> int:
    """Bytes that can be taken without swapping, a container's limit counted in."""
    free: int = psutil.virtual_memory().available
    found = limits()
    return free if found.ram_free is None else min(free, found.ram_free)


@contextlib.contextmanager
def capped(device: torch.device, asked: Asked) -> Iterator[None]:
    """Hold the allocator to what was asked for: beyond it is out of memory, not the card's end.

    Freed memory is kept in pieces that grow, so that a cap is not lost to fragments.
    """
    if device.type != "cuda":
        yield
        return
    if sys.platform == "linux":  # read when the first memory is taken
        os.environ.setdefault(_SPLIT, "expandable_segments:True")
    if asked.vram is None:
        yield
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    share = max(asked.vram - _context_nbytes(device), 1) / total
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
