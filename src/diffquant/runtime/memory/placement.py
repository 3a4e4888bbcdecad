"""Placement: which weights are on the device, and what happens when they do not fit after all.

Parts come when their first layer is asked for, so nobody says when a part begins; from level
`model` on, the part before it goes. A rung says how much of a part is on the device at once
(convert/footprint/levels.py has the arithmetic). `attempt` runs a piece of work; out of memory, it
drops everything, goes one rung down and runs the same piece again, as long as there is a rung.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from diffquant.convert.footprint.levels import spread
from diffquant.core.errors import ResourceError
from diffquant.runtime.layers import PackedLayer, PackedWeight, QuantEmbedding
from diffquant.runtime.memory.groups import Group, blocks_of, layers_of, loose
from diffquant.runtime.memory.rungs import Rung, next_rung, told
from diffquant.runtime.memory.stream import Stream
from diffquant.runtime.strips import Decoding, Mode

__all__ = ["Placement", "out_of_memory"]

_Result = TypeVar("_Result")
_WORDS = ("not enough memory", "out of memory", "can't allocate memory")


class _Part:
    """One part's weights; the home of its layers while they are not all on the device."""

    def __init__(self, name: str, module: nn.Module, placement: Placement) -> None:
        self.name, self.device = name, placement.device
        self._placement = placement
        self._module = module
        self._layers = layers_of(module)
        self._tables = [
            layer
            for layer in module.modules()
            if isinstance(layer, QuantEmbedding) and layer.stored is not None
        ]
        self._stream: Stream | None = None
        self._loaded: dict[PackedLayer, PackedWeight] = {}
        self._covered: dict[PackedLayer, PackedWeight] = {}  # loaded once, under a weight not ours
        for layer in (*self._layers.values(), *self._tables):
            layer.home = self

    @property
    def here(self) -> bool:
        """Whether any of its weights are on the device."""
        return self._stream is not None or bool(self._loaded)

    def leave(self) -> None:
        """Take the weights off the device; the layers ask here for them from now on."""
        if self._stream is not None:
            self._stream.close()
            if self._stream.unlocked:
                self._placement.steps.append(
                    f"{self.name}: {self._stream.unlocked >> 20} MiB of host memory could not be "
                    "page-locked, so copies did not overlap with work"
                )
            self._stream = None
        # A weight that was put in place of ours meanwhile (a damaged one) is not ours to take.
        for layer in (*self._layers.values(), *self._tables):
            mine = (self._loaded.get(layer), self._covered.get(layer))
            if layer.home is self or any(one is layer.packed for one in mine):
                assert layer.stored is not None
                layer.packed, layer.home = layer.stored.outline, self
                self._covered.pop(layer, None)
            elif layer in self._loaded:
                self._covered[layer] = self._loaded[layer]
        self._loaded = {}

    def weight(self, layer: PackedLayer) -> PackedWeight:
        """See layers.Home."""
        if not self.here:
            self._enter()
        if layer in self._loaded:
            return self._loaded[layer]
        if isinstance(layer, QuantEmbedding):  # asked for as a matrix, such as a tied output
            assert layer.stored is not None
            return layer.stored.load().to(self.device)
        assert self._stream is not None, "what is not streamed was loaded"
        return self._stream.weight(layer)

    def rows(self, layer: PackedLayer, index: Tensor, dtype: torch.dtype) -> Tensor:
        """See layers.Home: rows are read from the file, and decoded on the CPU."""
        if not self.here:
            self._enter()
        if layer in self._loaded:
            return self._loaded[layer].take_rows(index, dtype)
        assert layer.stored is not None
        some = layer.stored.load_rows(index.cpu())
        if some is None:  # not stored by rows: the table comes whole, to the CPU
            return layer.stored.load().take_rows(index.cpu(), dtype).to(self.device)
        return some.dequantize(dtype).to(self.device)

    def _enter(self) -> None:
        """Bring what the rung has on the device; other parts go first where it says so."""
        self._placement.make_room(self)
        rung = self._placement.rung
        groups, kept = self._groups(rung)
        if groups:
            self._stream = Stream(groups, device=self.device, pinned=rung.pinned, kept=kept)
            return
        # a part whose blocks all stay comes like one that streams: its tables stay on the host
        tables = () if rung.level == "blocks" else self._tables
        for layer in (*self._layers.values(), *tables):
            if layer.home is not self:  # it holds another weight meanwhile
                continue
            assert layer.stored is not None
            self._loaded[layer] = layer.stored.load().to(self.device)
        for layer, weight in self._loaded.items():
            layer.packed, layer.home = weight, None
            layer.on_replace = self._replaced

    def _replaced(self, layer: PackedLayer, weight: PackedWeight) -> None:
        """Hear that a weight of ours was replaced (low_bit.py); it is ours, and goes when we do."""
        self._loaded[layer] = weight

    def _groups(self, rung: Rung) -> tuple[list[Group], list[Group]]:
        """Groups to stream and which of them stay; none: the part comes whole."""
        if rung.level == "sequential":
            return [Group(name, (layer,)) for name, layer in self._layers.items()], []
        blocks = blocks_of(self._layers) if rung.level == "blocks" else ()
        stay = min(rung.resident.get(self.name, 0), len(blocks))
        if self.name == "vae" or not blocks or stay == len(blocks):
            return [], []
        rest = loose(self._layers, blocks)
        kept = [rest, *(blocks[index] for index in sorted(spread(len(blocks), stay)))]
        return [rest, *blocks], kept


class Placement:
    """The weights of a pipeline's parts on one device.

    Attributes:
        rung: how they are placed now.
        steps: what did not go as planned, for people.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], device: torch.device, rung: Rung | None = None
    ) -> None:
        """Take the parts, whose weights are stored; nothing is read yet."""
        self.device = device
        self.rung = rung or Rung("none", "whole", pinned=False)
        self.steps: list[str] = []
        self._below: tuple[Rung, ...] = ()
        self._parts = [_Part(name, module, self) for name, module in modules.items()]

    def settle(self, rung: Rung, below: Sequence[Rung] = ()) -> None:
        """Place by `rung` from now on; what is on the device goes where another level needs that.

        Args:
            rung: how weights are placed.
            below: where to go from there when memory does not suffice, in order.
        """
        if (rung.level, rung.resident, rung.pinned) != (
            self.rung.level,
            self.rung.resident,
            self.rung.pinned,
        ):
            self._drop()
        self.rung, self._below = rung, tuple(below)

    def release(self) -> None:
        """Take everything off the device, until it is asked for again."""
        self._drop()

    def make_room(self, part: _Part) -> None:
        """Let the other parts go, where one is on the device at a time."""
        if self.rung.level == "none":
            return
        there = [one for one in self._parts if one is not part and one.here]
        for one in there:
            one.leave()
        if there:
            _give_back(self.device)

    @property
    def decoding(self) -> Decoding:
        """How the autoencoder works now."""
        return Decoding(cast(Mode, self.rung.decoder))

    def attempt(
        self, work: Callable[[], _Result], what: str, *, autoencoder: bool = False
    ) -> _Result:
        """Run `work`, and again one rung down when memory runs out.

        Args:
            work: has no effect before it returns.
            what: it is, for people.
            autoencoder: whether that is the part at work.

        Raises:
            ResourceError: there is no rung left.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0][:200]
            # out of the handler, which holds the frames that hold the tensors
            self._drop()
            following = next_rung(self.rung, self._below, autoencoder=autoencoder)
            if following is None:
                raise ResourceError(
                    f"{what}: out of memory on {self.device} even at {told(self.rung)} "
                    f"({reason}): make a smaller picture, or use a smaller type"
                )
            before = told(self.rung)
            self.rung, self._below = following
            self.steps.append(f"{what}: out of memory at {before}, run again at {told(self.rung)}")

    def _drop(self) -> None:
        for part in self._parts:
            part.leave()
        gc.collect()
        _give_back(self.device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device.

    CUDA has a class of its own; the CPU's allocator and MPS raise RuntimeError with a text.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return any(word in text for word in _WORDS)


def _give_back(device: torch.device) -> None:
    """Return freed memory to the device, so that another part can have it in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
