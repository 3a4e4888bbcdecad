"""Which kernels decode which formats on a device, and why: `kernels.best`, in groups."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Decoders", "decoders"]


@dataclass(frozen=True, slots=True)
class Decoders:
    """Formats that one kind of routine serves for one reason.

    Attributes:
        device: type of the device.
        dtype: what is decoded to.
        backend: stored, numba, triton or torch.
        reason: why this one.
        formats: number formats.
    """

    device: str
    dtype: str
    backend: str
    reason: str
    formats: tuple[str, ...]


def decoders(device: str, dtype: str) -> tuple[Decoders, ...]:
    """Group the formats of a device, the largest group first.

    Args:
        device: cpu, cuda or mps; it need not be here.
        dtype: torch's name of the compute dtype.
    """
    import torch

    from diffquant.runtime.kernels import KERNELS, best

    groups: dict[tuple[str, str], list[str]] = {}
    for name in KERNELS:
        service = best(name, device, getattr(torch, dtype))
        groups.setdefault((service.backend, service.reason), []).append(name)
    rows = (
        Decoders(device, dtype, backend, reason, tuple(names))
        for (backend, reason), names in groups.items()
    )
    return tuple(sorted(rows, key=lambda row: -len(row.formats)))
