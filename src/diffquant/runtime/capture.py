"""A step captured once and replayed: what a denoiser launches becomes one CUDA graph.

SDXL's step is 2,200 kernels that Python launches one by one, three times as long as the card needs
to run them (docs/lab-log.md, 2026-11-27). A graph launches them all at once. What was captured
holds addresses: so inputs are copied to where the first ones lay, and what the model reads (its
weights, rotary tables) must stay where it is until the graphs are gone, which is when the context
ends. Nothing in a step may ask the card for a number, or allocate on the host and copy.

Weights that are streamed are fetched by Python code, which no graph holds: a denoiser with such a
layer runs as it is, and what was seen before is forgotten: weights that left come again, and some
are quantized again (low_bit.py), by the first call of each shape. Where weights were moved,
replaced or turned to another dtype, graphs that were made before are dropped, and made anew.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffquant.runtime.layers import PackedLayer

__all__ = ["Captured", "CudaGraphs", "Recorder", "captured"]

_MOST = 6  # shapes of inputs that are captured; each holds a step's activations
_CONSTANT_NBYTES = 1 << 20  # tensors on the host up to here are part of what a graph is made for


class Recorder(Protocol):
    """Makes a call that can be repeated."""

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Run `call` once while recording: its result, and what fills it again."""
        ...


@functools.cache
def _stream_of_card(_index: int) -> torch.cuda.Stream:
    """What is captured on, one for each card: cuBLAS keeps 32 MiB for every stream it has met.

    torch's own is of the card that captured first. Called with that card current.
    """
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


class CudaGraphs:
    """CUDA graphs that share one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device | None = None) -> None:
        """The pool is made with the first graph, and anew once all of its graphs are gone.

        Args:
            device: the card that calls run on; None: the current one. Captured on another than
                theirs, kernels run, and the graph is empty (pytorch/pytorch#87894).
        """
        self._device = device
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def record(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Capture `call`.

        Raises:
            RuntimeError: something in it cannot be captured.
        """
        with torch.cuda.device(self._device):
            return self._recorded(call)

    def _recorded(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph, card = torch.cuda.CUDAGraph(), torch.cuda.current_device()
        if not self._graphs:  # a pool ends with its last graph, and cannot be used again
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=_stream_of_card(card)):
                found = call()
        except BaseException:
            torch.cuda.set_stream(stream)  # a capture that fails at its end leaves its own
            raise
        self._graphs.add(graph)
        graph.replay()  # capturing ran nothing
        return found, graph.replay


class Captured:
    """What became of a denoiser's calls.

    Attributes:
        graphs: made so far.
        plain: calls that ran as they are.
        captured: calls that were recorded.
        replayed: calls that were replays.
        failed: why nothing is captured any more, "" while it is.
        anew: drops what was captured and seen: calls will launch other kernels.
    """

    def __init__(self) -> None:
        """Nothing has run yet."""
        self.graphs, self.plain, self.captured, self.replayed, self.failed = 0, 0, 0, 0, ""
        self.anew: Callable[[], None] = lambda: None


@contextlib.contextmanager
def captured(
    denoiser: nn.Module,
    recorder: Recorder | None = None,
    *,
    most: int = _MOST,
) -> Iterator[Captured]:
    """Replay a denoiser's calls for the duration.

    The first call with inputs of some shapes runs as it is (kernels are compiled, work spaces
    made, layers find out how they multiply), the second is captured, the others are replays. A
    result is a copy: the next call of the same shapes, such as the other half of a guided step,
    does not change it.

    Args:
        denoiser: its `forward` is replaced, and put back.
        recorder: CudaGraphs().
        most: shapes that are captured; calls of further ones run as they are.
    """
    state = Captured()
    replays = _Replays(denoiser, recorder or CudaGraphs(), state, most)
    denoiser.forward = replays
    try:
        yield state
    finally:
        del denoiser.forward  # the class's own shows again
        replays.let_go()


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Python collects none meanwhile.

    A dead graph that is destroyed while another is captured ends that capture: an H100, later
    pictures of `verify`, cudaErrorStreamCaptureInvalidated; pytorch/pytorch#161037. PyTorch before
    2.9 collected garbage itself before each capture.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _Graph:
    """A captured call: where its inputs go, its result, and what runs it."""

    def __init__(self, recorder: Recorder, call: Callable[..., Any], leaves: list[Any]) -> None:
        # Outside of the pool, before the capture begins: nothing else may use this memory.
        self.inputs = [one.clone() if _moves(one) else one for one in leaves]
        self.found, self.run = recorder.record(lambda: call(self.inputs))

    def __call__(self, leaves: list[Any]) -> Any:  # noqa: ANN401 - what the model returns
        for mine, given in zip(self.inputs, leaves, strict=True):
            if _moves(given):
                mine.copy_(given)
        self.run()
        return self.result()

    def result(self) -> Any:  # noqa: ANN401
        return pytree.tree_map_only(Tensor, torch.clone, self.found)


class _Replays:
    """A denoiser's `forward` meanwhile."""

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        state: Captured,
        most: int,
    ) -> None:
        self._model, self._recorder, self._state, self._most = model, recorder, state, most
        self._places: Hashable = None  # where what graphs read lay when they were made
        self._layers = [one for one in model.modules() if isinstance(one, PackedLayer)]
        self._plain = type(model).forward
        self._seen: dict[Hashable, _Graph | None] = {}
        state.anew = self._forget

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - what models take
        state = self._state
        leaves, shape = pytree.tree_flatten((args, kwargs))
        key = (shape, *map(_fixed, leaves))
        streamed = any(layer.home is not None for layer in self._layers)
        if streamed or (state.graphs and self._places != self._now()):
            self._forget()
        graph = self._seen.get(key)
        if graph is not None:
            state.replayed += 1
            return graph(leaves)
        may = not streamed and not state.failed and state.graphs < self._most
        if key in self._seen and may:

            def call(given: list[Any]) -> Any:  # noqa: ANN401
                positional, named = pytree.tree_unflatten(given, shape)
                return self._plain(self._model, *positional, **named)

            try:
                with _no_garbage():
                    graph = _Graph(self._recorder, call, leaves)
            except RuntimeError as error:
                state.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                self._places = self._now()
                state.graphs += 1
                state.captured += 1
                self._seen[key] = graph
                return graph.result()
        self._seen.setdefault(key, None)
        state.plain += 1
        return self._plain(self._model, *args, **kwargs)

    def let_go(self) -> None:
        """Destroy the graphs, now: one that is left to be collected as garbage may harm others."""
        self._seen.clear()
        self._state.anew = lambda: None

    def _forget(self) -> None:
        self._seen.clear()
        self._state.graphs = 0

    def _now(self) -> Hashable:
        """Where every packed weight lies, and a parameter: all of them move and change together."""
        weights = tuple(
            layer.packed.segments[0].parts["weight"].data_ptr()
            for layer in self._layers
            if layer.packed is not None
        )
        one = next(self._model.parameters(), None)
        return weights, None if one is None else (one.data_ptr(), one.dtype)


def _moves(leaf: object) -> bool:
    """Whether a leaf is an input of the graph: a device's tensors; the host's are constants."""
    return isinstance(leaf, Tensor) and not _is_constant(leaf)


def _is_constant(leaf: Tensor) -> bool:
    return leaf.device.type == "cpu" and leaf.nbytes <= _CONSTANT_NBYTES


def _fixed(leaf: Any) -> Hashable:  # noqa: ANN401
    """What a graph depends on."""
    if not isinstance(leaf, Tensor):
        return (type(leaf), leaf if isinstance(leaf, Hashable) else repr(leaf))
    about = (leaf.device, leaf.dtype, tuple(leaf.shape))
    if _is_constant(leaf):
        return (*about, leaf.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return (*about, leaf.stride())
