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

__all__ = ["Service", "best", "fast_module", "is_stored"]

_STORED = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Service:
    """A routine chosen for a format on a device.

    Attributes:
        backend: "stored" (nothing to decode), "numba", "triton" or "torch".
        reason: why this one, for people.
        kernel: parts, shape and dtype to a tensor of that shape and dtype.
    """

    backend: str
    reason: str
    kernel: Kernel


@dataclass(frozen=True, slots=True)
class _Backend:
    """Fast routines for one type of device.

    Attributes:
        name: what they are written in.
        module: has KERNELS, DTYPES and `unavailable()`, why they cannot run here; loaded when
            it is first needed.
        reason: what they do better.
    """

    name: str
    module: str
    reason: str


_BACKENDS: Mapping[str, _Backend] = {
    "cpu": _Backend(
        "numba",
        "diffquant.runtime.kernels.numba",
        "decoded span by span into the compute dtype",
    ),
    "cuda": _Backend(
        "triton",
        "diffquant.runtime.kernels.triton",
        "decoded by one kernel into the compute dtype",
    ),
}


@functools.cache
def _loaded(backend: _Backend) -> tuple[ModuleType | None, str]:
    """The module of a backend's kernels, or why there is none."""
    try:
        module = importlib.import_module(backend.module)
    except ImportError as error:  # not installed, or built for another numpy
        return None, f"{backend.name} cannot be loaded ({error})"
    reason: str = module.unavailable()
    return (None, reason) if reason else (module, "")


def fast_module(device: str) -> tuple[ModuleType | None, str]:
    """The module of fast kernels for a type of device, or why there is none here."""
    if device not in _BACKENDS:
        return None, f"no kernels for {device} yet"
    return _loaded(_BACKENDS[device])


def is_stored(name: str, dtype: torch.dtype) -> bool:
    """Whether a weight of this format is stored in `dtype`, so that there is nothing to decode."""
    return _STORED.get(name) == dtype


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
    if is_stored(name, dtype):
        return Service("stored", "stored in the compute dtype", KERNELS[name])
    if device not in _BACKENDS:
        return Service("torch", f"no faster decoder for {device} yet", KERNELS[name])
    backend = _BACKENDS[device]
    module, reason = _loaded(backend)
    if module is None:
        return Service("torch", reason, KERNELS[name])
    kernels: Mapping[str, Kernel] = module.KERNELS
    if name not in kernels or dtype not in module.DTYPES:
        what = name if name not in kernels else str(dtype)
        return Service("torch", f"{backend.name} kernels do not know {what}", KERNELS[name])
    return Service(backend.name, backend.reason, kernels[name])
