"""Weights decoded ahead: on a second stream, while the layer before still multiplies.

Decoding moves bytes and a product of many tokens computes, yet one after the other they take the
sum of both: decoding q4_k is 11.5 ms of a Flux.1 step's 138 (docs/lab-log.md, 2026-11-27). A
product leaves multiprocessors idle in its last wave, and other kernels (norms, attention) most of
the memory's bandwidth. So within a step whose weights are asked for in a known order, the next
MOST are decoded on a stream of lower priority; a layer waits for its own. The numbers are the
same, and MOST further decoded weights lie on the device.

    watched     a call that runs as it is tells the order
    led         a call like it, for a capture: the order becomes part of the graph

A call that asks for another weight than was watched goes on decoding in place.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffquant.runtime.kernels.table import is_stored
from diffquant.runtime.layers import PackedLayer, QuantLinear
from diffquant.runtime.low_bit import LowBitLayer

__all__ = ["MOST", "CudaLanes", "Lanes", "Order", "led", "watched"]

MOST = 2  # weights that are decoded and not yet asked for
_ALONE = 2  # references to a weight that nobody else holds: ours, and that of who counts

Asked = tuple[PackedLayer, torch.dtype]
Order = tuple[Asked, ...]


class Lanes(Protocol):
    """Two queues of work for the device: the caller's, and one aside."""

    def aside(self) -> AbstractContextManager[Any]:
        """What is launched within goes to the other queue."""
        ...

    def mark(self) -> Any:  # noqa: ANN401 - what `wait` takes
        """Where the queue that is launched to has come."""
        ...

    def wait(self, mark: Any) -> None:  # noqa: ANN401
        """Nothing launched from now on begins before `mark` is reached."""
        ...


class CudaLanes:
    """The current stream, which should be of high priority, and one of low priority."""

    def __init__(self) -> None:
        """On the current device."""
        self._aside = torch.cuda.Stream(priority=0)  # type: ignore[no-untyped-call]

    def aside(self) -> AbstractContextManager[Any]:
        """See Lanes."""
        return torch.cuda.stream(self._aside)

    def mark(self) -> torch.cuda.Event:
        """See Lanes."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """See Lanes."""
        torch.cuda.current_stream().wait_event(mark)


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[Asked]]:
    """The order in which a call asks for weights that must be decoded; known once it has ended.

    Layers that found out on this call that they multiply in 8 bits will ask no more.
    """
    asked: list[Asked] = []

    def decode(layer: PackedLayer, dtype: torch.dtype) -> Tensor:
        if _is_decoded(layer, dtype):
            asked.append((layer, dtype))
        return layer.decoded(dtype)

    with _decoding(model, decode):
        yield asked
    asked[:] = [(layer, dtype) for layer, dtype in asked if not _multiplies_packed(layer)]


@contextlib.contextmanager
def led(model: nn.Module, order: Sequence[Asked], lanes: Lanes, most: int = MOST) -> Iterator[_Led]:
    """Decode weights ahead, in a known order, for the duration of one call."""
    state = _Led(order, lanes, most)
    with _decoding(model, state.weight):
        yield state
        state.join()


@contextlib.contextmanager
def _decoding(model: nn.Module, decode: Any) -> Iterator[None]:  # noqa: ANN401 - layers.Decode
    layers = [one for one in model.modules() if isinstance(one, PackedLayer)]
    for layer in layers:
        layer.decode = decode
    try:
        yield
    finally:
        for layer in layers:
            layer.decode = None


class _Led:
    """One call.

    Attributes:
        ahead: weights that were decoded ahead, so far.
    """

    def __init__(self, order: Sequence[Asked], lanes: Lanes, most: int) -> None:
        self.ahead = 0
        self._order, self._lanes, self._most = deque(order), lanes, most
        self._ready: deque[tuple[Asked, Tensor, Any]] = deque()
        self._used: Tensor | None = None
        self._begun = False

    def weight(self, layer: PackedLayer, dtype: torch.dtype) -> Tensor:
        """The weight, decoded; what was given before is done with."""
        if not _is_decoded(layer, dtype):
            return layer.decoded(dtype)
        self._let_go()
        self._fill()
        if not self._ready or self._ready[0][0] != (layer, dtype):
            self._order.clear()
            return layer.decoded(dtype)
        _, found, mark = self._ready.popleft()
        self._lanes.wait(mark)
        self._used = found
        self.ahead += 1
        self._fill()
        return found

    def join(self) -> None:
        """What was launched aside ends before what the caller launches next."""
        if self._begun:
            with self._lanes.aside():
                mark = self._lanes.mark()
            self._lanes.wait(mark)
        self._used = None
        self._ready.clear()

    def _let_go(self) -> None:
        """The memory of the last weight is free once what was launched until now has run."""
        if self._used is None:
            return
        if sys.getrefcount(self._used) > _ALONE:
            # Somebody keeps it, and may read it later: it is never written to again.
            self._used = None
            self._order.clear()
            return
        mark = self._lanes.mark()
        with self._lanes.aside():
            self._lanes.wait(mark)
            self._used = None

    def _fill(self) -> None:
        """Launch what may be decoded by now."""
        if not self._order or len(self._ready) >= self._most:
            return
        if not self._begun:
            mark = self._lanes.mark()
            with self._lanes.aside():
                self._lanes.wait(mark)
            self._begun = True
        with self._lanes.aside():
            while self._order and len(self._ready) < self._most:
                asked = self._order.popleft()
                layer, dtype = asked
                found = layer.decoded(dtype)
                self._ready.append((asked, found, self._lanes.mark()))


def _is_decoded(layer: PackedLayer, dtype: torch.dtype) -> bool:
    """Whether asking for the weight launches a kernel, and may do so ahead."""
    if layer.home is not None:
        return False
    return not all(is_stored(name, dtype) for name in layer.outline().formats)


def _multiplies_packed(layer: PackedLayer) -> bool:
    product = layer.product if isinstance(layer, QuantLinear) else None
    return isinstance(product, LowBitLayer) and product.state == "on"
