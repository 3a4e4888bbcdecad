"""What formats look up, kept on each device: code books of 16 or 256 values, grids of vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffquant.quant.codecs import fp4_bnb, nf4
from diffquant.quant.codecs.dynamic_map import DYNAMIC_MAP
from diffquant.quant.codecs.grids import grid
from diffquant.quant.codecs.iq4_search import VALUES

__all__ = ["on_device", "table"]

_BOOKS: Mapping[str, NDArray[np.float32]] = {
    "iq4": VALUES,
    "nf4": nf4.CODE,
    "fp4": fp4_bnb.CODE,
    "dynamic": DYNAMIC_MAP,
}


@functools.cache
def on_device(name: str, device: torch.device) -> Tensor:
    """A code book as float32, or the grid of a format as int8 (its values are small integers)."""
    values = _BOOKS[name] if name in _BOOKS else grid(name).astype(np.int8)
    return torch.tensor(values, device=device).reshape(-1)


def table(name: str) -> Callable[[torch.device], Tensor]:
    """The table `name`, made for a device when it is first decoded there."""
    return functools.partial(on_device, name)
