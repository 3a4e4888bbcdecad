"""Find the weights of a model that a LoRA's layers mean, in whatever naming the LoRA uses.

What a name means is told by places.py. A LoRA of Diffusers' `to_q` reaches rows [0, N) of a fused
`qkv`; where rows are in another order it is cut into several spans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from diffquant.convert.adapters import WHOLE
from diffquant.convert.architectures.base import Architecture
from diffquant.convert.lora.base import UNKNOWN, guess_base
from diffquant.convert.lora.deltas import has_bias_change, has_weight_change, reach_of, refusal
from diffquant.convert.lora.group import Adapter
from diffquant.convert.lora.parse import LoraLayer
from diffquant.convert.lora.places import Names, module_names
from diffquant.convert.rules import Piece, Shape, Shapes

__all__ = [
    "AdapterMatch",
    "AdapterTarget",
    "LoraMatch",
    "LoraTarget",
    "Span",
    "looks_like",
    "match_adapters",
    "match_lora",
    "module_names",
]

Rows: TypeAlias = tuple[int, int]
Named: TypeAlias = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A weight that a layer changes.

    Attributes:
        part: denoiser, text_encoder or text_encoder_2.
        key: canonical part-local key of the weight.
        rows: rows of the weight that are changed; None: all.
        up_rows: rows of the layer's up factor that say how; None: all.
        layer: the layer.
    """

    part: str
    key: str
    rows: Rows | None
    up_rows: Rows | None
    layer: LoraLayer


@dataclass(frozen=True, slots=True)
class LoraMatch:
    """Which layers fit.

    Attributes:
        targets: in file order; a layer over reordered rows has several.
        unmatched: (name, reason) of layers that the model has no weight for.
        shape_mismatch: (name, reason) of layers whose weight has another shape.
    """

    targets: tuple[LoraTarget, ...]
    unmatched: tuple[Named, ...]
    shape_mismatch: tuple[Named, ...]

    @property
    def matched(self) -> int:
        """Number of layers that fit."""
        return len({target.layer.name for target in self.targets})


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) of a weight that are the rows of a module from `at` on."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """A weight or a bias that an adapter changes.

    Attributes:
        part: denoiser, text_encoder ...
        key: canonical part-local key.
        spans: where the module's rows are in it, in the module's order.
        rows: of the module, in this weight and others.
        tail: shape of a row.
        adapter: the adapter.
        bias: whether it is the module's bias.
    """

    part: str
    key: str
    spans: tuple[Span, ...]
    rows: int
    tail: Shape
    adapter: Adapter
    bias: bool = False


@dataclass(frozen=True, slots=True)
class AdapterMatch:
    """Which adapters fit.

    Attributes:
        targets: in file order; an adapter of a fused module may have several.
        absent: (name, part) of adapters for parts that the model does not have.
        unmatched: (name, reason) of adapters that the model has no weight for.
        mismatched: (name, reason) of adapters whose weight has another shape.
    """

    targets: tuple[AdapterTarget, ...]
    absent: tuple[Named, ...]
    unmatched: tuple[Named, ...]
    mismatched: tuple[Named, ...]


def match_lora(
    layers: Sequence[LoraLayer], architecture: Architecture, parts: Mapping[str, Shapes]
) -> LoraMatch:
    """Match layers with the weights of a model.

    Args:
        layers: as parsed.
        architecture: the model's.
        parts: part name -> canonical part-local key -> shape, norms and biases included.
    """
    found = match_adapters([layer.adapter for layer in layers], architecture, parts)
    by_adapter = {id(layer.adapter): layer for layer in layers}
    targets = [
        one
        for target in found.targets
        for one in _layer_targets(target, by_adapter[id(target.adapter)], parts[target.part])
    ]
    absent = tuple((name, f"the model has no {part}") for name, part in found.absent)
    return LoraMatch(tuple(targets), (*found.unmatched, *absent), found.mismatched)


def _layer_targets(target: AdapterTarget, layer: LoraLayer, shapes: Shapes) -> Iterator[LoraTarget]:
    for span in target.spans:
        length = span.stop - span.start
        rows = None if length == shapes[target.key][0] else (span.start, span.stop)
        up = None if length == target.rows else (span.at, span.at + length)
        yield LoraTarget(target.part, target.key, rows, up, layer)


def match_adapters(
    adapters: Sequence[Adapter],
    architecture: Architecture,
    parts: Mapping[str, Shapes],
    *,
    kinds: Mapping[str, str] | None = None,
) -> AdapterMatch:
    """Match adapters of any kind with the weights and biases of a model.

    Args:
        adapters: as grouped.
        architecture: the model's.
        parts: part name -> canonical part-local key -> shape, norms and biases included.
        kinds: part name -> `Component.kind`, where an architecture has several of a name.
    """
    named = Names(architecture, parts, kinds or {})
    targets: list[AdapterTarget] = []
    absent: list[Named] = []
    unmatched: list[Named] = []
    mismatched: list[Named] = []
    taken: dict[tuple[str, Piece], str] = {}
    for adapter in adapters:
        if why := refusal(adapter):
            unmatched.append((adapter.name, why))
            continue
        found: list[AdapterTarget] = []
        for bias in _sides(adapter):
            part, place = named.find(adapter, bias=bias)
            shapes = parts.get(part, {})
            if part not in parts:
                absent.append((adapter.name, part))
            elif place is None and bias and adapter.kind == "ia3":
                continue  # PEFT scales a bias where there is one
            elif place is None or place.reason:
                what = "such layer" if not bias else "bias in this layer"
                why = place.reason if place else f"the {part} has no {what}"
                unmatched.append((adapter.name, why))
            elif why := _misfit(adapter, place.pieces, shapes, bias=bias):
                mismatched.append((adapter.name, why))
            elif other := next((taken[part, p] for p in place.pieces if (part, p) in taken), None):
                unmatched.append((adapter.name, f"{other} already means the same weight"))
            else:
                taken.update({(part, piece): adapter.name for piece in place.pieces})
                found += _targets(part, adapter, place.pieces, shapes, bias=bias)
                continue
            found = []
            break
        if reach_of(adapter) == WHOLE and len(found) > 1:
            why = f"its rows are {len(found)} weights here, and {adapter.label} mixes rows"
            unmatched.append((adapter.name, why))
        else:
            targets += found
    return AdapterMatch(tuple(targets), tuple(absent), tuple(unmatched), tuple(mismatched))


def _sides(adapter: Adapter) -> tuple[bool, ...]:
    """Which of weight (False) and bias (True) an adapter changes."""
    weight, bias = has_weight_change(adapter), has_bias_change(adapter)
    return (*((False,) if weight else ()), *((True,) if bias else ()))


def _misfit(adapter: Adapter, pieces: Sequence[Piece], shapes: Shapes, *, bias: bool) -> str:
    """Why the parts do not fit the weight; empty when they do."""
    rows = sum(piece.stop - piece.start for piece in pieces)
    tail = shapes[pieces[0].key][1:]
    if bias:
        return _bias_misfit(adapter, rows)
    wanted = adapter.shape
    if wanted[0] in (None, rows) and _tail_fits(adapter, tail):
        return _inner_misfit(adapter, tail)
    found = tuple("?" if one is None else one for one in wanted)
    if all(isinstance(one, int) for one in found):
        return f"it is for a weight of shape {found}, the model has {(rows, *tail)}"
    listed = " x ".join(map(str, found))
    return f"it is for a weight of {listed}, the model has {(rows, *tail)}"


def _tail_fits(adapter: Adapter, tail: Shape) -> bool:
    """Whether rows have the length, or the kernel, that the parts say; None says nothing."""
    wanted = adapter.shape[1:]
    if all(one is None for one in wanted):
        return True
    if None in wanted:
        return False
    inner = tuple(one for one in wanted if one is not None)
    if _trim(inner) == _trim(tail) or inner == (math.prod(tail),):
        return True
    return adapter.kind == "ia3" and inner == tail[:1]


def _inner_misfit(adapter: Adapter, tail: Shape) -> str:
    """What the weight's shape has to be beyond what `Adapter.shape` says."""
    if adapter.kind == "oft" and "oft_r" in adapter.parts:
        numbers = adapter.shapes["oft_r"][1]
        size = (1 + math.isqrt(1 + 8 * numbers)) // 2
        if math.prod(tail) % size:
            return f"its blocks have {size} columns, the weight's rows {math.prod(tail)}"
    return ""


def _bias_misfit(adapter: Adapter, rows: int) -> str:
    for role in ("diff_b", "b_norm", "up_bias"):
        size = math.prod(adapter.shapes[role]) if role in adapter.parts else rows
        if size != rows:
            return f"its bias has {size} numbers, the model's {rows}"
    return ""


def _trim(shape: Shape) -> Shape:
    """Without trailing ones: a 1x1 convolution is a matrix."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _targets(
    part: str, adapter: Adapter, pieces: Sequence[Piece], shapes: Shapes, *, bias: bool
) -> list[AdapterTarget]:
    """One target for each weight that holds rows of the module."""
    rows = sum(piece.stop - piece.start for piece in pieces)
    spans: dict[str, list[Span]] = {}
    at = 0
    for piece in pieces:
        spans.setdefault(piece.key, []).append(Span(piece.start, piece.stop, at))
        at += piece.stop - piece.start
    return [
        AdapterTarget(part, key, tuple(found), rows, shapes[key][1:], adapter, bias)
        for key, found in spans.items()
    ]


def looks_like(layers: Sequence[LoraLayer]) -> tuple[str, ...]:
    """Architectures that a LoRA seems made for, the likeliest first; empty when nothing tells."""
    guess = guess_base([layer.adapter for layer in layers])
    return () if guess.architecture == UNKNOWN else (guess.architecture, *guess.also)
