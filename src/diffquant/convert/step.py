"""A step of a plan: one output weight, its source rows, its format, and what is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffquant.convert.adapters import Adapter
from diffquant.convert.dialects import Packed
from diffquant.convert.rules import Assignment, Shape
from diffquant.quant.formats import FORMATS, format_named, matrix_shape
from diffquant.quant.policy import Decision

__all__ = ["Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """One output weight: where its rows come from, how they are encoded, what is written.

    Attributes:
        part: denoiser, vae, text_encoder ... or "" for leftovers.
        key: canonical part-local key; what policies match and reports name.
        target: full key in the output.
        assignment: source rows; its `shape` is the output's logical shape.
        decision: format and reason; format "" copies the source's bytes.
        stored: what the output calls it: a format, or the source's dtype when copied.
        packed: the tensors written.
        source_nbytes: bytes read per pass.
        adapters: LoRA and kin, applied to float32 rows before the codec.
        flat: (rows, length) the weight is stored in where that is not its own shape; else ().
        rounding: how it is rounded, one of ROUNDINGS.
        encoder: "cpu", or "cuda" where cards encode it (placing.py).
        cut: rows that chunk borders must be multiples of beside the format's own (sharing.py).
        chunk: weights of a chunk, at most; 0: CHUNK (cutting.py).
    """

    part: str
    key: str
    target: str
    assignment: Assignment
    decision: Decision
    stored: str
    packed: tuple[Packed, ...]
    source_nbytes: int
    adapters: tuple[Adapter, ...] = ()
    flat: Shape = ()
    rounding: str = "nearest"
    cut: int = 1
    encoder: str = "cpu"
    chunk: int = 0

    @property
    def row_multiple(self) -> int:
        """Chunks of rows must start at a multiple of this many, so that they are whole blocks."""
        return math.lcm(self._whole_blocks, self.cut)

    @property
    def _whole_blocks(self) -> int:
        shape = self.assignment.shape
        if self.flat:
            _, k = matrix_shape(shape)
            return self.flat[1] // math.gcd(k, self.flat[1])
        name = self.decision.format or (self.stored if self.copies_packed else "")
        return format_named(name).row_multiple(shape) if name else 1

    def stored_shape(self, rows: int) -> Shape:
        """Shape in which so many rows of the weight are encoded and stored."""
        shape = self.assignment.shape
        if not self.flat:
            return (rows, *shape[1:])
        return (rows * matrix_shape(shape)[1] // self.flat[1], self.flat[1])

    @property
    def copies_packed(self) -> bool:
        """Whether an already quantized weight is copied with its companions."""
        if self.decision.format or self.stored not in FORMATS:
            return False
        return FORMATS[self.stored].strategy != "none"

    @property
    def passes(self) -> int:
        """How often the source rows are read."""
        return format_named(self.decision.format).passes if self.decision.format else 1

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return sum(one.spec.nbytes for one in self.packed)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        size = 1
        for length in self.assignment.shape:
            size *= length
        return size
