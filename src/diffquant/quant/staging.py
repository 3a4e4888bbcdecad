"""Rows on their way to a card and their parts on the way back: each thread has a stage of its own.

A stage is a stream and two page-locked buffers. While one thread's rows are copied, another's are
encoded and a third's parts come back: the threads that read, check and write are what overlaps the
copies, so that no order of work has to be kept between them. A thread waits without holding the
interpreter or a core.

Parts are returned as memory of their own: the buffers serve the thread's next rows.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffquant.core.errors import ResourceError, UnsupportedShape
from diffquant.quant.backends import Statistic, backend
from diffquant.quant.formats import format_named

__all__ = ["Stages"]

_SLAB = 1 << 22  # weights on a card at once per thread, a chunk of placing.py: 16 MiB as float32


class Stages:
    """Encodes rows on cards; threads are spread over the cards, and stay where they are."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._mine = threading.local()
        self._turns = itertools.cycle(devices)
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._compiled: set[tuple[str, bool]] = set()

    def encode(
        self,
        weight: NDArray[np.float32],
        stats: Statistic | None,
        *,
        fmt: str,
        importance: NDArray[np.float32] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Encode rows as `backend(codec, "encode")` does on the CPU, with the same bytes.

        Args:
            weight: (R, K) float32, C-contiguous, finite.
            stats: as the codec's `encode` takes it.
            fmt: FORMATS name; its codec has an encoder for cards.
            importance: (K,) float32; the codec is one of WEIGHTED_ON_CARDS.

        Raises:
            UnsupportedShape: K does not divide into blocks, or importance has another length.
            ResourceError: the card or the host has no memory for it.
        """
        row = format_named(fmt)
        row.demand(weight.shape)
        if importance is not None and importance.shape != weight.shape[1:]:
            raise UnsupportedShape(
                f"importance of shape {importance.shape} for rows of {weight.shape[1]}"
            )
        multiple = row.row_multiple(weight.shape)
        rows = max(_SLAB // max(weight.shape[1], 1) // multiple, 1) * multiple
        whole = len(weight) <= rows or not all(part.per_row for part in row.parts)
        starts = (0,) if whole else range(0, len(weight), rows)
        slabs = [weight if whole else weight[at : at + rows] for at in starts]
        try:
            with self._alone((fmt, importance is not None)):
                found = [self._stage().encode(slab, stats, fmt, importance) for slab in slabs]
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"no memory on the card for {weight.nbytes} bytes of weights: {error}; use fewer "
                "--threads or --device cpu"
            ) from None
        if len(found) == 1:
            return found[0]
        return {name: np.concatenate([one[name] for one in found]) for name in found[0]}

    @contextlib.contextmanager
    def _alone(self, key: tuple[str, bool]) -> Iterator[None]:
        """Let the first thread compile a format's kernels while the others wait for them.

        Triton would let every thread compile the same.
        """
        if key in self._compiled:
            yield
            return
        with self._compiling:  # who waited compiles nothing more
            yield
        self._compiled.add(key)

    def _stage(self) -> _Stage:
        stage: _Stage | None = getattr(self._mine, "stage", None)
        if stage is None:
            with self._lock:
                device = torch.device(next(self._turns))
            stage = self._mine.stage = _CardStage(device) if device.type == "cuda" else _Stage()
        return stage


class _Stage:
    """On the CPU, where Triton's interpreter takes the card's place (tests)."""

    def encode(
        self,
        weight: NDArray[np.float32],
        stats: Statistic | None,
        fmt: str,
        importance: NDArray[np.float32] | None,
    ) -> dict[str, NDArray[Any]]:
        parts = _encode(_tensor(weight), stats, fmt, importance)
        return {name: part.numpy() for name, part in parts.items()}


class _CardStage(_Stage):
    """A stream and page-locked memory, which grows to the largest slab."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            self._done = _asleep()
        self._there = _Pinned()
        self._back = _Pinned()

    def encode(
        self,
        weight: NDArray[np.float32],
        stats: Statistic | None,
        fmt: str,
        importance: NDArray[np.float32] | None,
    ) -> dict[str, NDArray[Any]]:
        staged = self._there.take(weight.nbytes).view(torch.float32).view(weight.shape)
        np.copyto(staged.numpy(), weight)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            rows = staged.to(self._device, non_blocking=True)
            parts = _encode(rows, stats, fmt, importance)
            back = self._fetch(parts)
            self._done.record(self._stream)
        self._done.synchronize()
        return {name: part.numpy().copy() for name, part in back.items()}

    def _fetch(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Begin to copy parts back, one behind the other."""
        ends = list(itertools.accumulate(_aligned(part.nbytes) for part in parts.values()))
        memory, found = self._back.take(ends[-1]), {}
        for (name, part), end in zip(parts.items(), ends, strict=True):
            start = end - _aligned(part.nbytes)
            staged = memory[start : start + part.nbytes].view(part.dtype).view(part.shape)
            found[name] = staged.copy_(part, non_blocking=True)
        return found


class _Pinned:
    """Page-locked bytes, allocated anew where more are asked for."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, nbytes: int) -> Tensor:
        """The first `nbytes`; what was taken before is overwritten.

        Raises:
            ResourceError: the system locks no such memory.
        """
        if self._memory is None or self._memory.numel() < nbytes:
            try:
                self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                raise ResourceError(
                    f"no page-locked memory for {nbytes} bytes of weights: {error}; use fewer "
                    "--threads or --device cpu"
                ) from None
        return self._memory[:nbytes]


def _tensor(array: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.require(array, requirements="W"))  # torch warns of read-only memory


def _encode(
    rows: Tensor, stats: Statistic | None, fmt: str, importance: NDArray[np.float32] | None
) -> dict[str, Tensor]:
    """Encode rows where they are; importance follows them there, a few kilobytes."""
    weigh = {}
    if importance is not None:
        columns = np.ascontiguousarray(importance, dtype=np.float32)
        weigh["importance"] = _tensor(columns).to(rows.device)
    encode = backend(format_named(fmt).codec, "encode", "cuda")
    found: dict[str, Tensor] = encode(rows, stats, fmt=fmt, **weigh)
    return found


def _asleep() -> torch.cuda.Event:
    """An event that is waited for without a busy core."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16
