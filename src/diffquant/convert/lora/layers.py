"""Adapters of LoRA files in the streaming loop: the changes of one weight, by every file in order.

A module may be some rows of a weight (`to_q` of a fused `qkv`), in another order than the weight
has them. Changes are made on the module's rows and put back; what they amount to is added up, for
the report.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.adapters import ROWS, WHOLE
from diffquant.convert.lora.deltas import Parts, bias_change, reach_of, weight_change
from diffquant.convert.lora.match import Span
from diffquant.core.errors import PolicyError

__all__ = ["LayerChange", "MergedLayer", "Tally"]


@dataclass(frozen=True, slots=True)
class LayerChange:
    """What one adapter of one file does to one weight, or bias.

    Attributes:
        file: index of the file among those merged.
        parts: of the adapter.
        spans: rows of the weight that are rows of the module.
        strength: of the file.
        bias: whether it is the bias of the module that is changed.
        transposed: the weight is the transpose of the module's, all of it.
    """

    file: int
    parts: Parts
    spans: tuple[Span, ...]
    strength: float
    bias: bool = False
    transposed: bool = False

    @property
    def reach(self) -> str:
        """ROWS or WHOLE."""
        if self.transposed:
            return WHOLE
        return ROWS if self.bias else reach_of(self.parts.adapter)

    def change(self, weight: NDArray[np.float32], rows: tuple[int, int]) -> NDArray[np.float32]:
        """What is added to rows of the weight; zero where it is not the module's."""
        found = np.zeros_like(weight)
        calculate = bias_change if self.bias else weight_change
        if self.transposed:
            module = np.ascontiguousarray(weight.T)
            return calculate(self.parts, module, (0, len(module)), self.strength).T
        if self.reach == WHOLE:
            order = np.concatenate([np.arange(s.start, s.stop) for s in self.spans]) - rows[0]
            here = (order >= 0) & (order < len(weight))
            if here.all():
                changed = calculate(self.parts, weight[order], (0, len(order)), self.strength)
                found[order] = changed
            elif here.any():
                raise PolicyError(
                    f"{self.parts.adapter.name}: {self.parts.adapter.label} mixes rows that this "
                    "output keeps in several tensors: write a single file in its place"
                )
            return found
        for span in self.spans:
            start, stop = max(span.start, rows[0]), min(span.stop, rows[1])
            if start < stop:
                own = slice(start - rows[0], stop - rows[0])
                at = start - span.start + span.at
                found[own] = calculate(
                    self.parts, weight[own], (at, at + stop - start), self.strength
                )
        return found


@dataclass(slots=True)
class Tally:
    """Squares added up over the chunks of a weight: how large it is, and its changes.

    A chunk that is computed twice, as formats of two passes do, counts once.
    """

    chunks: dict[tuple[int, int], tuple[float, float, float, tuple[float, ...]]] = field(
        default_factory=dict
    )
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(
        self,
        rows: tuple[int, int],
        *,
        weight: float,
        merged: float,
        change: float,
        changes: tuple[float, ...],
    ) -> None:
        """Add one chunk: squared norms of the weight before and after, of all changes, of each."""
        with self.lock:
            self.chunks[rows] = (weight, merged, change, changes)

    def _total(self, values: Iterator[float]) -> float:
        return math.sqrt(sum(values))

    @property
    def weight(self) -> float:
        """Norm of the weight before any change."""
        return self._total(self.chunks[rows][0] for rows in sorted(self.chunks))

    @property
    def merged(self) -> float:
        """Norm of the weight after all changes."""
        return self._total(self.chunks[rows][1] for rows in sorted(self.chunks))

    @property
    def change(self) -> float:
        """Norm of what all files change together."""
        return self._total(self.chunks[rows][2] for rows in sorted(self.chunks))

    def of(self, index: int) -> float:
        """Norm of one change."""
        return self._total(self.chunks[rows][3][index] for rows in sorted(self.chunks))


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """The convert/adapters.py Adapter of one weight: changes in the order of the files.

    Its text is its name alone, by which an interrupted run is known again: it says files and
    strengths.
    """

    name: str
    changes: tuple[LayerChange, ...] = field(repr=False)
    tally: Tally = field(default_factory=Tally, compare=False, repr=False)

    @property
    def reach(self) -> str:
        """WHOLE if any change needs all rows."""
        return WHOLE if any(one.reach == WHOLE for one in self.changes) else ROWS

    def apply(self, weight: NDArray[np.float32], rows: tuple[int, int]) -> NDArray[np.float32]:
        """Return the changed rows, and count how much that is."""
        merged, sizes = weight, []
        for one in self.changes:
            change = one.change(merged, rows)
            sizes.append(_square(change))
            change += merged
            merged = change
        together = sizes[0] if len(sizes) == 1 else _square(merged - weight)
        self.tally.put(
            rows,
            weight=_square(weight),
            merged=_square(merged),
            change=together,
            changes=tuple(sizes),
        )
        return merged


def _square(values: NDArray[np.float32]) -> float:
    return float(np.einsum("rk,rk->", values, values, dtype=np.float64))
