"""Find the weights of a model that a LoRA's layers mean, in whatever naming the LoRA uses.

Names come from the architecture's own rules, applied to the model at hand, so no depth or width is
written here: canonical module names, Diffusers names (each made of rows of canonical weights), and
both again with underscores for dots. A LoRA of Diffusers' `to_q` so reaches rows [0, N) of a fused
`qkv`; where rows are in another order it is cut into several targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from diffquant.convert.architectures.base import Architecture, Component
from diffquant.convert.architectures.links import backward
from diffquant.convert.lora.base import UNKNOWN, guess_base
from diffquant.convert.lora.parse import LoraLayer, Naming
from diffquant.convert.rules import Piece, Rule, Shape, Shapes

__all__ = ["LoraMatch", "LoraTarget", "looks_like", "match_lora", "module_names"]

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
class _Place:
    """What a name means: rows of weights, or the reason why nothing can be done."""

    pieces: tuple[Piece, ...]
    reason: str = ""


def match_lora(
    layers: Sequence[LoraLayer], architecture: Architecture, parts: Mapping[str, Shapes]
) -> LoraMatch:
    """Match layers with the weights of a model.

    Args:
        layers: as parsed.
        architecture: the model's.
        parts: part name -> canonical part-local key -> shape, norms and biases included.
    """
    names = {name: _index(architecture.component(name), shapes) for name, shapes in parts.items()}
    targets: list[LoraTarget] = []
    unmatched: list[Named] = []
    mismatched: list[Named] = []
    taken: dict[tuple[str, Piece], str] = {}
    for layer in layers:
        part, place = _find(layer, names)
        if part not in parts:
            unmatched.append((layer.name, f"the model has no {part}"))
        elif place is None or place.reason:
            why = place.reason if place else f"the {part} has no such layer"
            unmatched.append((layer.name, why))
        elif why := _misfit(layer, place.pieces, parts[part]):
            mismatched.append((layer.name, why))
        elif other := next((taken[part, p] for p in place.pieces if (part, p) in taken), None):
            unmatched.append((layer.name, f"{other} already means the same weight"))
        else:
            taken.update({(part, piece): layer.name for piece in place.pieces})
            targets += _targets(part, layer, place.pieces, parts[part])
    return LoraMatch(tuple(targets), tuple(unmatched), tuple(mismatched))


def module_names(component: Component, shapes: Shapes) -> dict[str, tuple[Piece, ...]]:
    """Every dotted module name of a part, canonical, Diffusers and alternate, and what it means.

    Weights that Diffusers keeps transposed mean no rows: their pieces are empty.
    """
    found: dict[str, tuple[Piece, ...]] = {
        key.removesuffix(".weight"): (Piece(key, 0, shape[0]),)
        for key, shape in shapes.items()
        if key.endswith(".weight") and shape
    }
    for rule in _other_namings(component, shapes):
        for one in rule.assignments(shapes):
            if one.target.endswith(".weight"):
                pieces = () if one.transpose else one.pieces
                found.setdefault(one.target.removesuffix(".weight"), pieces)
    return found


def _other_namings(component: Component, shapes: Shapes) -> Sequence[Rule]:
    """Rules from canonical keys to the other naming in use: Diffusers', or transformers 5's."""
    if not component.same_names:
        return component.rules(shapes, "canonical", "diffusers")
    if "alternate" in component.signatures:  # its links lead to canonical names: walk them back
        return backward(component.links_of(shapes, "alternate"), shapes)
    return ()


def _index(component: Component, shapes: Shapes) -> dict[tuple[Naming, str], _Place]:
    found: dict[tuple[Naming, str], _Place] = {}
    for name, pieces in module_names(component, shapes).items():
        place = _Place(pieces, "" if pieces else "the model keeps this weight transposed")
        found["dotted", name] = place
        flat: tuple[Naming, str] = ("underscored", name.replace(".", "_"))
        if found.setdefault(flat, place) != place:
            found[flat] = _Place((), "the name means more than one weight")
    return found


def _find(
    layer: LoraLayer, names: Mapping[str, Mapping[tuple[Naming, str], _Place]]
) -> tuple[str, _Place | None]:
    """The part a layer is for and its place there; files that name no part mean any."""
    key = (layer.naming, layer.module)
    if layer.part:
        return layer.part, names.get(layer.part, {}).get(key)
    for part, index in names.items():
        if key in index:
            return part, index[key]
    return next(iter(names)), None


def _misfit(layer: LoraLayer, pieces: Sequence[Piece], shapes: Shapes) -> str:
    """Why the factors do not fit the weight; empty when they do."""
    rows = sum(piece.stop - piece.start for piece in pieces)
    tail = shapes[pieces[0].key][1:]
    inner = layer.down_shape[1:]
    same = _trim(inner) == _trim(tail) or inner == (math.prod(tail),)
    if same and layer.up_shape[0] == rows and math.prod(layer.up_shape[2:]) == 1:
        return ""
    found = (layer.up_shape[0], *layer.down_shape[1:])
    return f"it is for a weight of shape {found}, the model has {(rows, *tail)}"


def _trim(shape: Shape) -> Shape:
    """Without trailing ones: a 1x1 convolution is a matrix."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _targets(
    part: str, layer: LoraLayer, pieces: Sequence[Piece], shapes: Shapes
) -> Iterator[LoraTarget]:
    start = 0
    for piece in pieces:
        stop = start + piece.stop - piece.start
        whole = (piece.start, piece.stop) == (0, shapes[piece.key][0])
        rows = None if whole else (piece.start, piece.stop)
        yield LoraTarget(part, piece.key, rows, None if len(pieces) == 1 else (start, stop), layer)
        start = stop


def looks_like(layers: Sequence[LoraLayer]) -> tuple[str, ...]:
    """Architectures that a LoRA seems made for, the likeliest first; empty when nothing tells."""
    guess = guess_base([layer.adapter for layer in layers])
    return () if guess.architecture == UNKNOWN else (guess.architecture, *guess.also)
