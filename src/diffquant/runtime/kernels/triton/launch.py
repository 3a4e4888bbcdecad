"""What a program takes: its tile, the width of its loads; launching is the encoders' too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffquant.quant.codecs.triton.launch import launch

__all__ = ["TILES", "Tile", "aligned", "group", "launch", "steps", "tile"]

_WIDEST = 16  # bytes of the widest load


class Tile(NamedTuple):
    """What a program takes: how many weights, a power of two from 512 on, and how many warps."""

    weights: int = 2048
    warps: int = 4


# Formats that are faster with another tile than the default: benchmarks/gpu_kernels.py --sweep.
# Rotated ones take two vectors to a thread, so that it writes two weights at once: chosen by
# counting instructions, 1.12 to 1.41 of the floor on an H100.
_TWICE = (
    "int8_convrot", "int8_convrot_64", "convrot_w4a4", "convrot_w4a4_64", "asym_w4a8_int8",
    "asym_w4a8_int8_64",
)  # fmt: skip
# Units of 64 weights in four planes: of 2048 weights half of four warps would have none.
_FOUR_PLANES = ("q2_k", "q3_k", "q6_k")
TILES: dict[str, Tile] = dict.fromkeys((*_TWICE, *_FOUR_PLANES), Tile(4096))


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


def steps(command: Tensor) -> tuple[int, int]:
    """Strides over batch and tokens of (B or 1, L or 1, width), 0 where one row serves all."""
    batch, tokens = (command.stride(i) if command.shape[i] > 1 else 0 for i in (0, 1))
    return batch, tokens
