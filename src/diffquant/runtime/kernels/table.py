"""Which routine serves (format, device, compute dtype), and why that one.

The torch reference serves everything everywhere; a faster routine must give the same numbers. A row
is chosen once and says its reason, so that `doctor` and reports can show what runs on a machine.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from diffquant.core.errors import UnknownFormat
from diffquant.runtime.kernels.fields import Kernel
from diffquant.runtime.kernels.reference import KERNELS

__all__ = ["Service", "best"]

_STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Service:
    """A routine chosen for a format on a device.

    Attributes:
        backend: "stored" (nothing to decode), "numba" or "torch".
        reason: why this one, for people.
        kernel: parts, shape and dtype to a tensor of that shape and dtype.
    """

    backend: str
    reason: str
    kernel: Kernel


@functools.cache
def _numba() -> tuple[ModuleType | None, str]:
    """The module of numba kernels, or why there is none."""
    try:
        return importlib.import_module("diffquant.runtime.kernels.numba"), ""
    except ImportError as error:  # not installed, or built for another numpy
        return None, f"numba cannot be loaded ({error})"


@functools.cache
def best(name: str, device: str, dtype: torch.dtype) -> Service:
    """Choose the fastest routine.

    Args:
        name: number format.
        device: type of the device that the parts are on: cpu, cuda, mps.
        dtype: what is decoded to.

    Raises:
        UnknownFormat: nobody can decode it.
    """
    if name not in KERNELS:
        raise UnknownFormat(name, KERNELS)
    if _STORED.get(name) == dtype:
        return Service("stored", "stored in the compute dtype", KERNELS[name])
    if device != "cpu":
        return Service("torch", f"no faster decoder for {device} yet", KERNELS[name])
    module, reason = _numba()
    if module is None:
        return Service("torch", reason, KERNELS[name])
    kernels: Mapping[str, Kernel] = module.KERNELS
    if name not in kernels or dtype not in module.DTYPES:
        what = name if name not in kernels else str(dtype)
        return Service("torch", f"numba kernels do not know {what}", KERNELS[name])
    return Service("numba", "decoded span by span into the compute dtype", kernels[name])
