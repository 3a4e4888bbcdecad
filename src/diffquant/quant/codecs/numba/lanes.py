"""Scratch for kernels that run 64 sub-blocks side by side, one in each lane."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32

__all__ = ["LANES", "scratch"]

LANES = 64
_CACHE_LINE = 64


def scratch(rows: int) -> Float32:
    """Allocate (rows, LANES) float32 on a cache line: vectors across two lines halve the speed."""
    nbytes = rows * LANES * 4
    raw = np.empty(nbytes + _CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % _CACHE_LINE
    return raw[start : start + nbytes].view(np.float32).reshape(rows, LANES)
