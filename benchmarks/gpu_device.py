"""What memory benchmarks measure on a GPU: peaks, the context, the bus, bytes that were copied."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GIB = 1 << 30


class Device:
    """What is measured on a device; on a CPU, seconds alone."""

    def __init__(self, name: str) -> None:
        import torch

        self.torch, self.name = torch, name
        self.cuda = name == "cuda"
        self.bus = 0.0
        if self.cuda:
            self.total = torch.cuda.get_device_properties(0).total_memory
            self.bus = self._bus()

    def reset_peak(self) -> None:
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()

    def sync(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()
        self.reset_peak()

    @property
    def context(self) -> int:
        """Bytes of the device that no allocator of the framework counts."""
        if not self.cuda:
            return 0
        free, total = self.torch.cuda.mem_get_info()
        return int(total - free - self.torch.cuda.memory_reserved())

    def peak(self) -> dict[str, int | None]:
        if not self.cuda:
            return dict.fromkeys(("allocated_nbytes", "reserved_nbytes", "context_nbytes"))
        found = {
            "allocated_nbytes": self.torch.cuda.max_memory_allocated(),
            "reserved_nbytes": self.torch.cuda.max_memory_reserved(),
            "context_nbytes": self.context,
        }
        found["total_nbytes"] = found["reserved_nbytes"] + found["context_nbytes"]
        return found

    @contextlib.contextmanager
    def capped(self, nbytes: int) -> Iterator[None]:
        """Leave the allocator what a card of so many bytes would have beside the context."""
        if not self.cuda or not nbytes:
            yield
            return
        share = max(nbytes - self.context, 1) / self.total
        self.torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
        try:
            yield
        finally:
            self.torch.cuda.set_per_process_memory_fraction(1.0)

    def _bus(self) -> float:
        """Bytes per second from page-locked memory to the device, median of seven copies."""
        from diffquant.runtime.memory.pinned import pin

        nbytes = GIB // 2
        host = pin(nbytes)
        there = self.torch.empty(nbytes, dtype=self.torch.uint8, device="cuda")
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            there.copy_(host.tensor, non_blocking=True)
            self.torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        host.free()
        return nbytes / statistics.median(seconds[1:])


@dataclass
class Copied:
    """Bytes that streams have begun to bring to a slot."""

    nbytes: int = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        from diffquant.runtime.memory import stream

        opened, counter = stream.open_lane, self

        def open_lane(*args: Any, **kwargs: Any) -> Any:
            lane = opened(*args, **kwargs)
            start = lane.start

            def counted(group: Any, slot: int) -> None:
                counter.nbytes += group.nbytes
                start(group, slot)

            lane.start = counted
            return lane

        stream.open_lane = open_lane
        try:
            yield
        finally:
            stream.open_lane = opened
