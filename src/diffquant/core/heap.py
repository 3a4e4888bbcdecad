"""When glibc's malloc gives memory back to the system; elsewhere everything here does nothing.

Left alone, glibc gives the top of a heap back at each large free, and the next allocation of the
same size faults all its pages in again: half of a conversion's time (docs/lab-log.md, 2026-11-22).
Streaming therefore keeps freed pages while it runs; inference, whose layers are decoded among
living blocks, gives them back at once. The two settings are here together because the process has
only one: leaving `keep_freed_pages` restores what was in force. MALLOC_* variables of the user win.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["give_back_freed_blocks", "keep_freed_pages"]


@dataclass(frozen=True, slots=True)
class _Option:
    """A parameter of mallopt: its number in glibc's malloc.h and the user's own way to set it."""

    number: int
    variable: str


_TRIM = _Option(-1, "MALLOC_TRIM_THRESHOLD_")
_MMAP = _Option(-3, "MALLOC_MMAP_THRESHOLD_")
# What glibc's thresholds rise to by themselves with use (DEFAULT_MMAP_THRESHOLD_MAX, and twice it).
_AS_IT_WAS = {_TRIM: 64 << 20, _MMAP: 32 << 20}
# Chunks are a few MiB. Larger blocks are mapped alone and given back when freed, as a whole.
_KEEP = {_TRIM: 256 << 20, _MMAP: 32 << 20}
_GIVE_BACK = {_MMAP: 4 << 20}

_lock = threading.Lock()
_keeping = 0
_settled: Mapping[_Option, int] = _AS_IT_WAS


def _call(name: str) -> Callable[..., int] | None:
    """A function of the C library, if this is glibc and has it."""
    if sys.platform != "linux" or not hasattr(os, "confstr"):
        return None
    with contextlib.suppress(ValueError, OSError):  # musl knows no such name
        if (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return getattr(ctypes.CDLL(None), name, None)
    return None


def _set(options: Mapping[_Option, int]) -> None:
    mallopt = _call("mallopt")
    if mallopt is None:
        return
    for option, nbytes in options.items():
        if option.variable not in os.environ:
            mallopt(option.number, nbytes)


def give_back_freed_blocks() -> None:
    """From now on, give blocks of 4 MiB and more back to the system when they are freed."""
    global _settled
    with _lock:
        if _GIVE_BACK.items() <= _settled.items():
            return
        _settled = {**_settled, **_GIVE_BACK}
        if not _keeping:
            _set(_settled)


@contextlib.contextmanager
def keep_freed_pages() -> Iterator[None]:
    """Keep freed memory for the next chunk while inside; give it back at the end."""
    global _keeping
    with _lock:
        _keeping += 1
        if _keeping == 1:
            _set(_KEEP)
    try:
        yield
    finally:
        with _lock:
            _keeping -= 1
            if not _keeping:
                _set(_settled)
                trim = _call("malloc_trim")
                if trim is not None:
                    trim(0)
