"""The parts of one adapter, read as float32 when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.logical import LogicalSource
from diffquant.convert.lora.alphas import scalar
from diffquant.convert.lora.group import Adapter
from diffquant.convert.rules import Shape
from diffquant.core.errors import MalformedFile

__all__ = ["Parts", "Rows"]

Rows: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Parts:
    """An adapter, where its numbers are, and the weight it is for.

    Attributes:
        adapter: as grouped.
        source: the adapter's file, open and bound.
        rows: of the module's weight.
        tail: shape of one row of the weight: (K,), or (in, kh, kw) of a kernel.
        config: PEFT's configuration; empty where there is none.
    """

    adapter: Adapter
    source: LogicalSource = field(repr=False)
    rows: int
    tail: Shape
    config: Mapping[str, Any] = field(repr=False)

    def __contains__(self, role: str) -> bool:
        return role in self.adapter.parts

    def shape(self, role: str) -> Shape:
        """Shape of a part as the file has it."""
        return self.adapter.shapes[role]

    def read(self, role: str, rows: Rows | None = None) -> NDArray[np.float32]:
        """Read a part, or rows of it, in its own shape.

        Raises:
            MalformedFile: NaN or infinity in it.
        """
        key, shape = self.adapter.parts[role], self.adapter.shapes[role]
        if len(shape) < 2:
            values = self.source.read(key).reshape(shape)
            values = values[slice(*rows)] if rows else values
        else:
            values = self.source.read(key, rows)
            values = values.reshape(values.shape[0], *shape[1:])
        if not np.isfinite(values).all():
            raise MalformedFile(f"{key}: NaN or infinity in it", path=self.source.source.path)
        return values

    def matrix(self, role: str, rows: Rows | None = None) -> NDArray[np.float32]:
        """Read a part, or rows of it, as (rows, everything else)."""
        values = self.read(role, rows)
        return values.reshape(values.shape[0], -1)

    def number(self, role: str) -> float:
        """Read a part of one element."""
        return scalar(self.source.source, self.adapter.parts[role])

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by at strength 1.

        Two whole factors of a Kronecker product have no rank, and no scale either.
        """
        adapter = self.adapter
        if adapter.alpha is None or not adapter.rank:
            return 1.0
        return adapter.alpha / (math.sqrt(adapter.rank) if adapter.rooted else adapter.rank)
