"""Lanes: how a group's bytes get into one of two slots on the device while it computes.

    file --read--> host buffer --copy--> slot      CUDA: the copy runs on a stream of its own
    file --read--> slot                            CPU: a slot is host memory

Two slots: one is computed from, the other is being filled. On CUDA a slot is overwritten only after
what was queued before the filling began has run, and is computed from only after it arrived: two
events, no waiting on the host.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from diffquant.convert.footprint.levels import READERS, SLOTS
from diffquant.runtime.memory.groups import Group
from diffquant.runtime.memory.pinned import Pinned, pin

__all__ = ["Lane", "open_lane"]


class Lane(Protocol):
    """Fills slots.

    Attributes:
        slots: flat uint8 buffers on the device.
        unlocked: bytes of host memory that the driver refused to lock: copies from it make the
            host wait, and do not overlap with work.
    """

    slots: tuple[Tensor, ...]
    unlocked: int

    def start(self, group: Group, slot: int) -> None:
        """Begin to bring a group; returns at once where it can."""
        ...

    def wait(self, slot: int) -> None:
        """Return when what is computed next sees the group in the slot."""
        ...

    def close(self) -> None:
        """Finish what was begun and let go of all memory."""
        ...


def open_lane(device: torch.device, nbytes: int, *, pinned: bool) -> Lane:
    """A lane for groups of at most `nbytes` bytes.

    Args:
        device: what is computed on.
        nbytes: of a slot.
        pinned: keep every group in page-locked host memory once it was read (CUDA).

    Raises:
        torch.OutOfMemoryError: the slots do not fit.
    """
    if device.type == "cuda":
        return _CudaLane(device, nbytes, pinned=pinned)
    return _HostLane(device, nbytes)


class _HostLane:
    """The CPU, whose slots are filled in place; and devices whose copies are not told apart."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.slots = _slots(nbytes, device)
        self._threads = ThreadPoolExecutor(1, "diffquant-weights")  # groups, one after the other
        # On the CPU what is being read counts: one at a time.
        self._readers = ThreadPoolExecutor(1 if device.type == "cpu" else READERS, "diffquant-read")
        self._coming: dict[int, Future[None]] = {}
        self._staging = None if device.type == "cpu" else torch.empty(nbytes, dtype=torch.uint8)
        self.unlocked = 0  # nothing is asked to be

    def start(self, group: Group, slot: int) -> None:
        if slot in self._coming:  # brought in vain: must not arrive later
            self._coming.pop(slot).result()
        self._coming[slot] = self._threads.submit(self._bring, group, slot)

    def _bring(self, group: Group, slot: int) -> None:
        if self._staging is None:
            group.fill(self.slots[slot], self._readers)
            return
        group.fill(self._staging, self._readers)
        self.slots[slot].copy_(self._staging)

    def wait(self, slot: int) -> None:
        self._coming.pop(slot).result()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._readers.shutdown()
        self.slots = ()


class _CudaLane:
    """Copies on a stream of their own, from page-locked memory."""

    def __init__(self, device: torch.device, nbytes: int, *, pinned: bool) -> None:
        self.device = device
        self.slots = _slots(nbytes, device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arrived = tuple(_event() for _ in range(SLOTS))
        self._threads = ThreadPoolExecutor(1, "diffquant-weights")  # groups, one after the other
        self._readers = ThreadPoolExecutor(READERS, "diffquant-read")  # the parts of one
        self._coming: dict[int, Future[None]] = {}
        self._kept: dict[Group, Pinned] | None = {} if pinned else None
        self._staging: tuple[Pinned, ...] = (
            () if pinned else tuple(pin(nbytes) for _ in range(SLOTS))
        )
        self.unlocked = sum(one.tensor.nbytes for one in self._staging if one.unlock is None)

    def start(self, group: Group, slot: int) -> None:
        if slot in self._coming:  # brought in vain: must not arrive later
            self._coming.pop(slot).result()
        free = _event()
        free.record(torch.cuda.current_stream(self.device))
        kept = self._kept.get(group) if self._kept is not None else None
        if kept is not None:
            self._copy(kept.tensor[: group.nbytes], slot, free)
        else:
            self._coming[slot] = self._threads.submit(self._read, group, slot, free)

    def _read(self, group: Group, slot: int, free: torch.cuda.Event) -> None:
        kept = self._kept.get(group) if self._kept is not None else None
        if kept is not None:  # asked for twice before it was read once
            host = kept
        elif self._kept is not None:
            host = pin(group.nbytes)
            self.unlocked += 0 if host.unlock is not None else host.tensor.nbytes
            group.fill(host.tensor, self._readers)
            self._kept[group] = host
        else:
            host = self._staging[slot]
            self._arrived[slot].synchronize()  # its last copy may still read from it
            group.fill(host.tensor, self._readers)
        self._copy(host.tensor[: group.nbytes], slot, free)

    def _copy(self, host: Tensor, slot: int, free: torch.cuda.Event) -> None:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            self.slots[slot][: host.numel()].copy_(host, non_blocking=True)
            self._arrived[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        if slot in self._coming:
            self._coming.pop(slot).result()
        torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._readers.shutdown()
        torch.cuda.synchronize(self.device)
        self.slots = ()
        for host in (*self._staging, *(self._kept or {}).values()):
            host.free()
        self._staging, self._kept = (), None


def _slots(nbytes: int, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):  # a caller's; a thread of ours fills them outside of it
        return tuple(torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(SLOTS))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
