"""Which compute devices this machine has."""

from __future__ import annotations

import torch

__all__ = ["available_devices"]


def available_devices() -> tuple[str, ...]:
    """Device names torch can use here, "cpu" always among them."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return tuple(found)
