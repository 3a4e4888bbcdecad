"""Groups: layers whose weights come to the device together, and the flat buffer they come in.

    buffer of a group   | part | pad | part | pad | ...     each part at a multiple of ALIGN bytes

One copy moves a group; each layer's weight is a set of views into the buffer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffquant.runtime.layers import PackedLayer, PackedWeight, QuantEmbedding, Segment
from diffquant.runtime.stored import StoredPart, StoredWeight

__all__ = ["ALIGN", "Group", "blocks_of", "layers_of", "loose"]

ALIGN = 256  # bytes; what CUDA's own allocations begin at
_BLOCK = re.compile(r"^.*?\.\d+(?=\.)")


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that come together.

    Attributes:
        name: of the block or layer.
        layers: in the order of their module; each holds a stored weight.
    """

    name: str
    layers: tuple[PackedLayer, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its buffer."""
        return sum(_room(outline) for *_, outline in self._parts())

    def load(self) -> Iterator[tuple[PackedLayer, PackedWeight]]:
        """Read layer by layer, to the CPU."""
        for layer in self.layers:
            yield layer, _stored(layer).load()

    def fill(self, buffer: Tensor, readers: Executor) -> None:
        """Read every part into `buffer` (nbytes,) uint8 on the CPU; several at once."""
        at, begun = 0, []
        for layer in self.layers:
            for segment in _stored(layer).segments:
                for part in segment.parts.values():
                    place = buffer[at : at + part.nbytes]
                    begun.append(readers.submit(_read_into, part, place))
                    at += _room(part.outline)
        for one in begun:
            one.result()

    def views(self, buffer: Tensor) -> dict[PackedLayer, PackedWeight]:
        """The weights that a filled buffer holds, wherever it is."""
        at, parts = 0, {}
        for layer, index, name, outline in self._parts():
            piece = buffer[at : at + outline.nbytes].view(outline.dtype)
            parts[layer, index, name] = piece.reshape(outline.shape)
            at += _room(outline)
        return {
            layer: PackedWeight(
                tuple(
                    Segment(
                        one.format,
                        one.shape,
                        {name: parts[layer, index, name] for name in one.parts},
                    )
                    for index, one in enumerate(_stored(layer).segments)
                )
            )
            for layer in self.layers
        }

    def _parts(self) -> Iterator[tuple[PackedLayer, int, str, Tensor]]:
        for layer in self.layers:
            for index, segment in enumerate(_stored(layer).segments):
                for name, part in segment.parts.items():
                    yield layer, index, name, part.outline


def layers_of(module: nn.Module) -> Mapping[str, PackedLayer]:
    """Layers that hold a stored weight, by name, token tables left out."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, PackedLayer)
        and layer.stored is not None
        and not isinstance(layer, QuantEmbedding)
    }


def blocks_of(layers: Mapping[str, PackedLayer]) -> tuple[Group, ...]:
    """Layers by the block they are in, in the order of the module; a list of one is no list."""
    found: dict[str, list[PackedLayer]] = {}
    for name, layer in layers.items():
        if (block := _BLOCK.match(f"{name}.weight")) is not None:
            found.setdefault(block[0], []).append(layer)
    lists = [name.rpartition(".")[0] for name in found]
    return tuple(
        Group(name, tuple(inside))
        for name, inside in found.items()
        if lists.count(name.rpartition(".")[0]) > 1
    )


def loose(layers: Mapping[str, PackedLayer], groups: Iterable[Group]) -> Group:
    """What belongs to no group, as one."""
    taken = {id(layer) for group in groups for layer in group.layers}
    return Group("rest", tuple(one for one in layers.values() if id(one) not in taken))


def _read_into(part: StoredPart, place: Tensor) -> None:
    place.copy_(part.load().reshape(-1).view(torch.uint8))


def _stored(layer: PackedLayer) -> StoredWeight:
    assert layer.stored is not None, "groups are made of stored weights"
    return layer.stored


def _room(outline: Tensor) -> int:
    return math.ceil(outline.nbytes / ALIGN) * ALIGN
