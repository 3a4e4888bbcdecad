"""What the torch decoders of block formats share: the kernel's type, and fields of bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Kernel", "Parts", "half", "of_blocks", "shifted", "words"]

Parts: TypeAlias = Mapping[str, Tensor]
Kernel: TypeAlias = Callable[[Parts, tuple[int, ...], torch.dtype], Tensor]


def of_blocks(nbytes: int, decode: Callable[[Tensor], Tensor]) -> Kernel:
    """Wrap `decode`, which maps blocks (B, nbytes) uint8 to values float32 with B rows."""

    def kernel(parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        blocks = parts["weight"].reshape(-1, nbytes)
        return decode(blocks).reshape(shape).to(dtype)

    return kernel


def half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte `start` of every block, as float32 (B, 1)."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def shifted(packed: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Unpack fields `packed >> shift & mask`: (..., n) integers to (..., len(shifts), n)."""
    by = torch.tensor(shifts, dtype=packed.dtype, device=packed.device)[:, None]
    return (packed.unsqueeze(-2) >> by) & mask


def words(packed: Tensor) -> Tensor:
    """Read bytes (..., 2 n) as little-endian 16-bit words: int32 (..., n)."""
    pairs = packed.int().reshape(*packed.shape[:-1], -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 8
