"""Page-locked host memory of exactly the size that is asked for.

`torch.empty(pin_memory=True)` rounds up to a power of two and keeps what is freed: blocks of 340 MB
would take 512 each. So plain memory is registered with CUDA, and let go of again.
Source: pytorch/pytorch aten/src/ATen/core/CachingHostAllocator.h (`allocate`, `bit_ceil`).
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffquant.core.errors import ResourceError

__all__ = ["Pinned", "pin"]


@dataclass(frozen=True, slots=True)
class Pinned:
    """A buffer.

    Attributes:
        tensor: (nbytes,) uint8.
        unlock: unlocks its pages, once; None: the driver refused to lock them, and copies from it
            wait for the host.
    """

    tensor: Tensor
    unlock: Callable[[], object] | None

    def free(self) -> None:
        """Unlock; the memory goes with the last view of it."""
        if self.unlock is not None:
            self.unlock()


def pin(nbytes: int) -> Pinned:
    """Allocate and lock.

    Raises:
        ResourceError: the system has no such memory.
    """
    try:
        memory = np.empty(nbytes + 2 * mmap.PAGESIZE, np.uint8)
    except MemoryError:
        raise ResourceError(f"no host memory for {nbytes} bytes of weights") from None
    start = -memory.ctypes.data % mmap.PAGESIZE  # whole pages are locked, and nobody else's
    tensor = torch.from_numpy(memory[start : start + max(nbytes, 1)])
    pages = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    code = _runtime().cudaHostRegister(tensor.data_ptr(), pages, 0)
    if int(code) != 0:
        return Pinned(tensor, None)
    # Memory that is freed while locked poisons whatever is allocated there next: never without.
    unlock = weakref.finalize(memory, _runtime().cudaHostUnregister, tensor.data_ptr())
    unlock.atexit = False
    return Pinned(tensor, unlock)


def _runtime() -> Any:  # noqa: ANN401 - a module that torch makes
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
