"""Weights of a part: stored bytes, the blocks they can be streamed in, what decoding them takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from diffquant.convert.architectures.base import Layout
from diffquant.convert.footprint.companions import Companion
from diffquant.convert.footprint.decode import decode_nbytes
from diffquant.convert.footprint.moments import Buffer
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.convert.match import PartMatch, to_canonical
from diffquant.convert.rules import Shape
from diffquant.convert.step import Step

__all__ = ["PartWeights", "canonical_shapes", "companion_weights", "part_weights", "plan_weights"]

_BLOCK = re.compile(r"^.*?\.\d+(?=\.)")
# Tables of tokens: looked up row by row, and never decoded whole.
_TABLE = re.compile(r"embed|shared\.weight$|wte\.weight$")
_HALF = 2  # bytes a weight of parts that are only estimated: they are published in 16 bits


@dataclass(frozen=True, slots=True)
class PartWeights:
    """Weights of one part.

    Attributes:
        nbytes: as stored.
        blocks: bytes of each repeated block, in order of appearance.
        largest: the largest single stored weight.
        matrix: the largest that is no table of tokens.
        scratch: what decoding takes at the worst, and for which weight.
    """

    nbytes: int
    blocks: tuple[int, ...]
    largest: Buffer
    matrix: Buffer
    scratch: Buffer

    @property
    def rest(self) -> int:
        """Bytes outside of all blocks."""
        return self.nbytes - sum(self.blocks)


class _Row(NamedTuple):
    """A weight: where it belongs, what it takes."""

    key: str
    nbytes: int
    size: int
    format: str


def part_weights(logical: LogicalSource, part: PartMatch, *, compute: str) -> PartWeights:
    """Weights of a part of an opened source, as they are stored there.

    An autoencoder counts as one block: nobody streams it.
    """
    names = _canonical_names(part)
    rows = []
    for local in part.shapes:
        tensor = logical.tensors[part.prefix + local]
        if tensor.is_float or tensor.is_quantized:
            key = names.get(part.prefix + local, local)
            rows.append(_Row(key, _stored(logical, tensor), tensor.spec.size, tensor.format))
    return _sum(rows, compute, streams=part.name != "vae")


def plan_weights(steps: Iterable[Step], *, compute: str) -> PartWeights:
    """Weights of a part as a plan would write it."""
    rows = [
        _Row(step.key, step.nbytes, step.parameters, step.decision.format or step.stored.lower())
        for step in steps
    ]
    return _sum(rows, compute)


def companion_weights(companion: Companion) -> PartWeights:
    """Weights of a text encoder that the file does not hold, in 16 bits."""
    nbytes = companion.parameters * _HALF
    table = companion.vocabulary * companion.width * _HALF
    block = (nbytes - table) // companion.layers
    matrix = companion.hidden * companion.width * _HALF
    widest = Buffer("feed-forward", matrix)
    largest = Buffer("token table", table) if table > matrix else widest
    blocks = (block,) * companion.layers
    return PartWeights(nbytes, blocks, largest, widest, Buffer("nothing to decode", 0))


def canonical_shapes(part: PartMatch) -> Mapping[str, Shape]:
    """Shapes under canonical names where the way to them is known, else as they are."""
    if part.layout == "canonical":
        return part.shapes
    return {one.target: one.shape for one in to_canonical(part)}


def _canonical_names(part: PartMatch) -> dict[str, str]:
    """Source key -> canonical key of what it goes into."""
    layout: Layout = part.layout
    if layout == "canonical":
        return {}
    return {piece.key: one.target for one in to_canonical(part) for piece in one.pieces}


def _stored(logical: LogicalSource, tensor: LogicalTensor) -> int:
    keys = {tensor.key, *tensor.parts.values()}
    return sum(logical.source.specs[key].nbytes for key in keys)


def _sum(rows: list[_Row], compute: str, *, streams: bool = True) -> PartWeights:
    none = _Row("nothing", 0, 0, "f32")
    matrices = [row for row in rows if not _TABLE.search(row.key)]
    largest = max(rows, key=lambda row: row.nbytes, default=none)
    matrix = max(matrices, key=lambda row: row.nbytes, default=none)

    def decoded(row: _Row) -> int:
        return decode_nbytes(row.format, row.size, compute=compute)

    worst = max(matrices, key=decoded, default=none)
    told = f"{worst.key}, stored as {worst.format or 'something else'}"
    return PartWeights(
        nbytes=sum(row.nbytes for row in rows),
        blocks=_blocks(rows) if streams else (),
        largest=Buffer(largest.key, largest.nbytes),
        matrix=Buffer(matrix.key, matrix.nbytes),
        scratch=Buffer(told if decoded(worst) else "nothing to decode", decoded(worst)),
    )


def _blocks(rows: list[_Row]) -> tuple[int, ...]:
    """Bytes of each block of a list of two and more."""
    found: dict[str, int] = {}
    for row in rows:
        name = _BLOCK.match(row.key)
        if name is not None:
            found[name[0]] = found.get(name[0], 0) + row.nbytes
    lengths = Counter(name.rpartition(".")[0] for name in found)
    return tuple(size for name, size in found.items() if lengths[name.rpartition(".")[0]] > 1)
