"""Regional compilation: each repeated block of a denoiser becomes one graph, its weights packed.

Compiling a whole denoiser takes minutes; its blocks are alike, so one of each kind is compiled and
serves them all. Inside a graph, decoding is one call (kernels/op.py) and packed parts are inputs
of the graph, as norms and biases are: no block's bytes are baked in, and a damaged, moved or
replaced weight of the same form needs no new graph. Another dtype or shape does, by torch's own
guards: a run that falls back to float32 compiles once more, and stays right.

Weights that are streamed are fetched by Python code in the middle of a block, which no graph can
hold. A block with such a layer runs as it is, call by call, for as long as that lasts: weights
come with the first call, and may go when memory runs out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import threading
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from diffquant.runtime.few_rows import settle
from diffquant.runtime.layers import PackedLayer, QuantLinear

__all__ = ["LEAST", "Compiled", "compiled", "kind", "kinds_of", "preload", "regions", "said_by"]


# A kind that serves fewer blocks takes as long to compile as one that serves sixty: SDXL has twelve
# such among its residual blocks, and two that serve seventy.
LEAST = 3


_COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")


@functools.cache
def preload() -> threading.Thread:
    """Load torch's compiler beside other work: a second or two, once in a process.

    Whoever compiles joins the thread first, so that nobody meets a module half loaded.
    """
    thread = threading.Thread(target=_load, name="compiler", daemon=True)
    thread.start()
    return thread


def _load() -> None:
    with contextlib.suppress(ImportError):  # told where it is needed, by the same import
        for name in _COMPILER:
            importlib.import_module(name)


def regions(denoiser: nn.Module) -> tuple[nn.Module, ...]:
    """The blocks that are compiled: innermost members of module lists with two layers or more.

    Of a transformer its blocks; of a UNet its residual blocks and the transformer blocks inside of
    its spatial transformers, whose own few layers are left.
    """
    members = [
        member
        for stack in denoiser.modules()
        if isinstance(stack, nn.ModuleList)
        for member in stack
        if not isinstance(member, nn.ModuleList) and len(_layers(member)) > 1
    ]
    known = set(members)
    return tuple(one for one in members if known.isdisjoint(list(one.modules())[1:]))


def kind(block: nn.Module) -> Hashable:
    """What a graph of a block depends on: blocks of one kind share it."""
    return (
        type(block),
        *(
            (
                layer.logical_shape,
                tuple((one.format, one.shape) for one in layer.outline().segments),
                tuple(
                    (one.down.shape, one.up.shape, one.down.dtype, one.scale, one.rows)
                    for one in layer.adapters
                ),
                layer.product.key if isinstance(layer, QuantLinear) and layer.product else None,
            )
            for layer in _layers(block)
        ),
        *(parameter.shape for parameter in block.parameters()),
    )


def kinds_of(denoiser: nn.Module, *, least: int = LEAST) -> dict[Hashable, list[nn.Module]]:
    """Blocks by kind, for kinds that serve at least so many: a graph each, per input shape."""
    found: dict[Hashable, list[nn.Module]] = {}
    for block in regions(denoiser):
        found.setdefault(kind(block), []).append(block)
    return {key: blocks for key, blocks in found.items() if len(blocks) >= least}


class Compiled:
    """What became of a denoiser's blocks.

    Attributes:
        blocks: how many are to be compiled.
        kinds: how many graphs they need, for one shape of their inputs.
        streamed: blocks whose last call ran as they are, their weights being streamed.
        failed: what the compiler said where that need not end the run; all blocks run as they
            are from then on.
    """

    def __init__(self, blocks: int, kinds: int) -> None:
        """Nothing has run yet."""
        self.blocks, self.kinds = blocks, kinds
        self.streamed: set[nn.Module] = set()
        self.failed = ""


@contextlib.contextmanager
def compiled(
    denoiser: nn.Module,
    *,
    backend: str | Callable[..., Any] = "inductor",
    on_compile: Callable[[int, int], None] = lambda _number, _kinds: None,
    required: bool = True,
    least: int = LEAST,
) -> Iterator[Compiled]:
    """Run a denoiser's blocks compiled for the duration; they are compiled when they first run.

    Args:
        denoiser: its blocks' `forward` is replaced, and put back.
        backend: of torch.compile. Inductor keeps what it made in its cache directory
            (TORCHINDUCTOR_CACHE_DIR), across runs.
        on_compile: called before a kind is compiled, with its number from 1 and how many kinds.
        required: whether a failing compiler ends the run.
        least: blocks that a kind must serve; blocks of others run as they are.

    Raises:
        torch._dynamo.exc.TorchDynamoException: from a block's call: the compiler failed, and was
            required.
    """
    settle(denoiser)
    kinds = kinds_of(denoiser, least=least)
    state = Compiled(sum(map(len, kinds.values())), len(kinds))
    for number, blocks in enumerate(kinds.values(), 1):
        announce = functools.partial(on_compile, number, len(kinds))
        one = _Kind(blocks[0], backend, announce, required=required)
        for block in blocks:
            block.forward = _Region(block, one, state)
    try:
        yield state
    finally:
        for block in itertools.chain(*kinds.values()):
            del block.forward  # the class's own shows again


class _Kind:
    """The compiled function of one kind.

    torch keeps graphs with the code they were made of, tries them in turn and stops at eight. So
    each kind gets code of its own: nothing is tried in vain, and the graphs go when we go.

    Attributes:
        survived: errors of the compiler that need not end the run; known once it is loaded.
    """

    def __init__(
        self,
        block: nn.Module,
        backend: str | Callable[..., Any],
        announce: Callable[[], None],
        *,
        required: bool,
    ) -> None:
        self._block, self._backend, self._required = block, backend, required
        self._announce: Callable[[], None] | None = announce
        self.survived: tuple[type[Exception], ...] = ()

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        """Made with the first call, so that the compiler is loaded while something else is done."""
        method = type(self._block).forward
        assert isinstance(method, types.FunctionType)
        own = types.FunctionType(
            method.__code__.replace(), method.__globals__, method.__name__, method.__defaults__,
            method.__closure__,
        )  # fmt: skip
        if self._backend == "inductor":
            preload().join()
        from torch._dynamo.exc import TorchDynamoException

        self.survived = () if self._required else (TorchDynamoException,)
        return torch.compile(own, backend=self._backend, fullgraph=True, dynamic=False)

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self._announce is not None:
            self._announce()
            self._announce = None
        return self._compiled(block, *args, **kwargs)


class _Region:
    """A block's `forward` meanwhile."""

    def __init__(self, block: nn.Module, one: _Kind, state: Compiled) -> None:
        self._block, self._kind, self._state = block, one, state
        self._layers = _layers(block)
        self._plain = type(block).forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - what blocks take
        if self._state.failed:
            return self._plain(self._block, *args, **kwargs)
        if any(layer.home is not None for layer in self._layers):
            self._state.streamed.add(self._block)
            return self._plain(self._block, *args, **kwargs)
        self._state.streamed.discard(self._block)
        try:
            return self._kind(self._block, *args, **kwargs)
        except self._kind.survived as error:  # nothing has run: graphs are made before
            self._state.failed = said_by(error)
        return self._plain(self._block, *args, **kwargs)


def said_by(error: BaseException) -> str:
    """What the compiler said, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _layers(block: nn.Module) -> tuple[PackedLayer, ...]:
    return tuple(one for one in block.modules() if isinstance(one, PackedLayer))
