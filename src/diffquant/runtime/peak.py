"""Highest memory of this process while something runs: what a comparison shows beside a file.

On a CUDA device the allocator's own peak. Elsewhere anonymous memory (what was allocated, without
mapped files and the page cache), sampled 50 times a second: RssAnon of /proc on Linux, else what
psutil calls unique. It is the process's, interpreter and libraries included.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Peak", "watched"]

_EVERY_S = 0.02
_STATUS = Path("/proc/self/status")


@dataclass(slots=True)
class Peak:
    """The highest value seen, None before `watched` ends or where nothing can be read."""

    nbytes: int | None = None

    @property
    def mib(self) -> float | None:
        """In MiB."""
        return None if self.nbytes is None else self.nbytes / 2**20


def _anonymous_nbytes() -> int | None:
    try:
        for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    try:
        return int(psutil.Process().memory_full_info().uss)
    except (psutil.Error, AttributeError):
        return None


@contextlib.contextmanager
def watched(device: str) -> Iterator[Peak]:
    """Watch memory for the duration; what is garbage by then is not counted."""
    gc.collect()
    found = Peak()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.nbytes = torch.cuda.max_memory_allocated(device)
        return
    seen: list[int] = []
    over = threading.Event()

    def sample() -> None:
        while True:
            now = _anonymous_nbytes()
            if now is None:
                return
            seen.append(now)
            if over.wait(_EVERY_S):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found.nbytes = max(seen, default=None)
