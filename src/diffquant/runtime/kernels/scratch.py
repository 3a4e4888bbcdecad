"""Memory for decoded weights, handed from one layer to the next.

A decoded weight lives for one call. Fresh memory for each costs page faults, up to half of what
decoding takes, so the last buffer is kept and lent again. It comes back when the tensor and
every view of it are gone, never before: a weight that somebody keeps stays as it is, and the next
one gets memory of its own. Nothing above KEPT_NBYTES is kept, and of two buffers the larger.
"""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["KEPT_NBYTES", "lend"]

KEPT_NBYTES = 64 << 20
_CACHE_LINE = 64
_Buffer = NDArray[np.uint8]

# At most one; append and pop are atomic, and what is taken back may come from any thread.
_idle: deque[_Buffer] = deque(maxlen=1)


def _take_back(buffer: _Buffer) -> None:
    if buffer.nbytes > KEPT_NBYTES:
        return
    try:
        other = _idle.pop()
    except IndexError:
        other = buffer
    _idle.append(max(buffer, other, key=lambda one: one.nbytes))


def lend(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised vector of `count` numbers that begins on a cache line.

    The memory is numpy's: from 4 MiB on numpy asks Linux for huge pages, which torch does not.
    """
    nbytes = count * dtype.itemsize
    try:
        buffer = _idle.pop()
    except IndexError:
        buffer = np.empty(0, np.uint8)
    if buffer.nbytes < nbytes + _CACHE_LINE:
        del buffer  # given back before its successor is asked for
        buffer = np.empty(nbytes + _CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % _CACHE_LINE
    view = buffer[start : start + nbytes]  # torch's storage holds this very object
    weakref.finalize(view, _take_back, buffer).atexit = False
    return torch.from_numpy(view).view(dtype)
