"""Weights of a part: bytes in memory, the groups they can be streamed in, what decoding one takes.

A part is split by what the runtime does with it:

    small     norms, biases and other parameters that are no packed layer: always on the device
    tables    rows per token, looked up one by one: read from the host where weights are streamed
    blocks    the packed layers of each repeated block, one group each
    loose     packed layers in no block

A group that is streamed is one flat buffer, its tensors aligned to 256 bytes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from diffquant.convert.architectures.base import Layout
from diffquant.convert.footprint.companions import Companion
from diffquant.convert.footprint.decode import Serving, decode_nbytes, usually
from diffquant.convert.footprint.moments import Buffer
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.convert.match import PartMatch, to_layout
from diffquant.convert.rules import Assignment, Piece, Shape
from diffquant.convert.step import Step
from diffquant.core.dtypes import STORAGE

__all__ = [
    "ALIGNMENT",
    "PartSource",
    "PartWeights",
    "canonical_shapes",
    "companion_weights",
    "part_weights",
    "plan_weights",
]

ALIGNMENT = 256  # bytes; where each tensor of a streamed group begins
_TRITON = usually("cuda")

_BLOCK = re.compile(r"^.*?\.\d+(?=\.)")
# Tables that the runtime looks rows up in: QuantEmbedding of runtime/models, by canonical names.
_TABLE = re.compile(
    r"(?:^|\.)(?:shared|embed_tokens|token_embedding|wte|word_embeddings|position_embedding"
    r"|relative_attention_bias|addition_t_embedding)\.weight$|(?:^|\.)positional_embedding$"
)
_BARE = re.compile(r"pad_token$")  # (1, width), and no layer
_KERNELS = (4, 5)  # dimensions of a convolution's kernel
_HALF = 2  # bytes a weight of parts that are only estimated: they are published in 16 bits
_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class PartWeights:
    """Weights of one part.

    Attributes:
        nbytes: all of them in memory.
        small: of them, parameters that are no packed layer.
        tables: of them, tables of rows per token.
        blocks: the group of each repeated block, in order of appearance, as it is streamed.
        layer: the largest packed layer that is no table, as it is streamed.
        scratch: what decoding takes at the worst, and for which weight.
    """

    nbytes: int
    small: int
    tables: int
    blocks: tuple[int, ...]
    layer: Buffer
    scratch: Buffer

    @property
    def layers(self) -> int:
        """Bytes of all packed layers that are no table."""
        return self.nbytes - self.small - self.tables

    @property
    def loose(self) -> int:
        """Bytes of packed layers in no block, tables aside."""
        return max(self.layers - sum(self.blocks), 0)


def _everything(_key: str) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class PartSource:
    """A part and the file it comes from, as somebody will load it.

    Attributes:
        layout: whose names the loader's model carries.
        reads: whether the loader takes the weight at a key of that layout.
        compute: STORAGE name of the dtype it computes in, "" for the picture's.
        serving: what runs where it computes.
        decodes: whether what is not packed as FORMATS says is decoded to float32 when it is
            loaded (runtime/packing.py), else it counts as stored.
    """

    logical: LogicalSource
    part: PartMatch
    layout: Layout = "canonical"
    reads: Callable[[str], bool] = _everything
    compute: str = ""
    serving: Serving = _TRITON
    decodes: bool = False


class _Row(NamedTuple):
    """A stored tensor or some rows of it: which layer it belongs to, what it takes."""

    key: str
    shape: Shape  # of the layer
    nbytes: int
    size: int
    format: str
    group_nbytes: int  # in a streamed group

    @property
    def is_layer(self) -> bool:
        return math.prod(self.shape[1:]) > 1 and len(self.shape) > 1 and not _BARE.search(self.key)

    @property
    def is_table(self) -> bool:
        return self.is_layer and _TABLE.search(self.key) is not None


def part_weights(source: PartSource, *, compute: str) -> PartWeights:
    """Weights of a part of an opened source, packed as they are stored there.

    An autoencoder counts without blocks: it is streamed layer by layer or not at all.
    """
    rows = [
        row
        for one in _assignments(source.part, source.layout)
        if source.reads(one.target)
        for row in _rows(source, one)
    ]
    streams = source.part.name != "vae"
    return _sum(rows, source.compute or compute, source.serving, streams=streams)


def plan_weights(
    steps: Iterable[Step], *, compute: str, serving: Serving | None = None
) -> PartWeights:
    """Weights of a part as a plan would write it; decoded by what a GPU usually has."""
    rows = [
        _Row(
            step.key,
            step.assignment.shape,
            step.nbytes,
            step.parameters,
            step.decision.format or step.stored.lower(),
            _aligned(step.nbytes),
        )
        for step in steps
    ]
    return _sum(rows, compute, serving or _TRITON)


def companion_weights(companion: Companion) -> PartWeights:
    """Weights of a text encoder that the file does not hold, in 16 bits."""
    nbytes = companion.parameters * _HALF
    table = companion.vocabulary * companion.width * _HALF
    block = (nbytes - table) // companion.layers
    widest = Buffer("feed-forward", companion.hidden * companion.width * _HALF)
    blocks = (block,) * companion.layers
    return PartWeights(nbytes, 0, table, blocks, widest, Buffer("nothing to decode", 0))


def canonical_shapes(part: PartMatch) -> Mapping[str, Shape]:
    """Shapes under canonical names where the way to them is known, else as they are."""
    if part.layout == "canonical":
        return part.shapes
    return {one.target: one.shape for one in to_layout(part, "canonical")}


def _assignments(part: PartMatch, layout: Layout) -> Iterator[Assignment]:
    """What goes where; itself where the names are right already."""
    if part.layout != layout:
        yield from to_layout(part, layout)
        return
    for local, shape in part.shapes.items():
        rows = shape[0] if shape else 1
        yield Assignment(local, shape, (Piece(part.prefix + local, 0, rows),))


def _rows(source: PartSource, one: Assignment) -> Iterator[_Row]:
    for piece in one.pieces:
        tensor = source.logical.tensors[piece.key]
        if not (tensor.is_float or tensor.is_quantized):
            continue
        # an axis other than the first: pieces are slices of equal size
        rows = max(tensor.shape[0] if tensor.shape else 1, 1)
        share = math.prod(one.shape) // len(one.pieces) if one.axis else None
        part = (piece.stop - piece.start) / rows if share is None else share / max(tensor.size, 1)
        size = round(tensor.size * part)
        cast = STORAGE[tensor.dtype].block_size == 1 and not tensor.is_quantized
        packed = bool(tensor.format) and not one.transpose and (part == 1 or cast)
        if source.decodes and not packed:
            nbytes = size * _FLOAT32
            yield _Row(one.target, one.shape, nbytes, size, "f32", _aligned(nbytes))
        else:
            stored = [round(nbytes * part) for nbytes in _stored(source.logical, tensor)]
            group = sum(map(_aligned, stored))
            yield _Row(one.target, one.shape, sum(stored), size, tensor.format, group)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _stored(logical: LogicalSource, tensor: LogicalTensor) -> list[int]:
    """Bytes of the weight and of each part that its file keeps beside it."""
    keys = {tensor.key, *tensor.parts.values()}
    return [logical.source.specs[key].nbytes for key in keys]


def _sum(rows: list[_Row], compute: str, serving: Serving, *, streams: bool = True) -> PartWeights:
    layers: dict[str, list[_Row]] = {}
    for row in rows:
        if row.is_layer and not row.is_table:
            layers.setdefault(row.key, []).append(row)
    groups = {key: sum(row.group_nbytes for row in pieces) for key, pieces in layers.items()}
    largest = max(groups, key=lambda key: groups[key], default="nothing")
    worst, scratch = "nothing to decode", 0
    for key, pieces in layers.items():
        needed = _decoded(pieces, compute, serving)
        if needed > scratch:
            formats = "+".join(dict.fromkeys(one.format or "something else" for one in pieces))
            worst, scratch = f"{key}, stored as {formats}", needed
    return PartWeights(
        nbytes=sum(row.nbytes for row in rows),
        small=sum(row.nbytes for row in rows if not row.is_layer),
        tables=sum(row.nbytes for row in rows if row.is_table),
        blocks=_blocks(groups) if streams else (),
        layer=Buffer(largest, groups.get(largest, 0)),
        scratch=Buffer(worst, scratch),
    )


def _decoded(pieces: list[_Row], compute: str, serving: Serving) -> int:
    """Bytes that a layer's weight takes beside its stored bytes, while the layer runs.

    Pieces are decoded one by one and then joined; a convolution may lay the result out again.
    """
    results, worst = 0, 0
    wanted = STORAGE[compute].block_nbytes
    whole = sum(row.size for row in pieces) * wanted
    for row in pieces:
        backend = serving.backend(row.format)
        needed = decode_nbytes(row.format, row.size, compute=compute, backend=backend)
        worst = max(worst, results + needed)
        results += row.size * wanted if needed else 0
    if len(pieces) > 1:
        worst, results = max(worst, results + whole), whole
    again = whole if serving.copies_kernels and len(pieces[0].shape) in _KERNELS else 0
    return max(worst, results + again)


def _blocks(groups: Mapping[str, int]) -> tuple[int, ...]:
    """Bytes of each block of a list of two and more."""
    found: dict[str, int] = {}
    for key, nbytes in groups.items():
        name = _BLOCK.match(key)
        if name is not None:
            found[name[0]] = found.get(name[0], 0) + nbytes
    lengths = Counter(name.rpartition(".")[0] for name in found)
    return tuple(size for name, size in found.items() if lengths[name.rpartition(".")[0]] > 1)
