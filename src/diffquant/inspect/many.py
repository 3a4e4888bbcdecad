"""describe_each(): many files at once, in several processes where that is cheap.

Reading headers is Python work, a few milliseconds for each thousand tensors, so threads gain
nothing. Forked processes do, and start at once; where there is no safe fork (macOS, Windows) files
are read one after the other.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from diffquant.core.errors import DiffquantError, ResourceError
from diffquant.inspect.describe import FileReport, describe

__all__ = ["Unreadable", "describe_each"]

_ENOUGH = 8  # files from which a second process is worth its start of about 20 ms
_MOST = 8  # processes


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that could not be described, among others that could: why, and its exit code."""

    path: str
    error: str
    exit_code: int


def describe_each(
    paths: Sequence[str | Path], *, deep: bool = False, judged: bool = True
) -> tuple[FileReport | Unreadable, ...]:
    """Describe several files; one that cannot be read does not keep the others from it.

    `deep` and `judged` as `describe` takes them.

    Raises:
        ResourceError: a reading process was killed, for want of memory most likely.
    """
    names = [str(path) for path in paths]
    one = functools.partial(_described, deep=deep, judged=judged)
    processes = min(_processors(), _MOST, len(names) // (_ENOUGH // 2))
    if processes < 2 or sys.platform != "linux":
        return tuple(map(one, names))
    pool = ProcessPoolExecutor(processes, get_context("fork"), initializer=_leave_interrupts)
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads; those of numpy's BLAS hold no lock of ours.
            warnings.simplefilter("ignore", DeprecationWarning)
            return tuple(pool.map(one, names, chunksize=2))
    except BrokenProcessPool:
        raise ResourceError(
            "a process that read headers was killed: name fewer files at once, or free memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _described(path: str, *, deep: bool, judged: bool) -> FileReport | Unreadable:
    gc.disable()  # headers are many small objects and no cycles: looking for some costs a tenth
    try:
        return describe(path, deep=deep, judged=judged)
    except DiffquantError as error:
        return Unreadable(path, str(error), error.exit_code)
    finally:
        gc.enable()


def _leave_interrupts() -> None:
    """Ctrl-C is the parent's to answer: no traceback of a child on the screen."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
