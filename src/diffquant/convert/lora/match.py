"""Find the weights of a model that an adapter's layers mean, in whatever naming they have.

One matcher serves `lora check`, `lora convert`, `lora merge`, `quantize --lora` and `generate
--lora`: what fits, fits everywhere. What a name means is told by places.py. A layer of Diffusers'
`to_q` reaches rows [0, N) of a fused `qkv`; where rows are in another order it is cut into several
spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from diffquant.convert.adapters import WHOLE
from diffquant.convert.architectures.base import Architecture
from diffquant.convert.lora.base import UNKNOWN, guess_base
from diffquant.convert.lora.deltas import has_bias_change, has_weight_change, reach_of, refusal
from diffquant.convert.lora.group import Adapter
from diffquant.convert.lora.misfits import bias_misfit, misfit
from diffquant.convert.lora.modules import Model, Part, model_with
from diffquant.convert.lora.parse import LoraLayer
from diffquant.convert.lora.places import Module
from diffquant.convert.rules import Piece, Shape, Shapes

__all__ = [
    "AdapterMatch",
    "AdapterTarget",
    "LoraMatch",
    "LoraTarget",
    "Placed",
    "Span",
    "Verdict",
    "looks_like",
    "match_adapters",
    "match_lora",
    "obstacle",
]

Rows: TypeAlias = tuple[int, int]
Named: TypeAlias = tuple[str, str]
Verdict: TypeAlias = Literal["matched", "unmatched", "shape_mismatch"]


@dataclass(frozen=True, slots=True)
class Placed:
    """One adapter and the module it means.

    Attributes:
        adapter: as grouped.
        part: of the model, or the one the adapter names.
        module: of the model, by its weight; None where there is none.
        bias: the module's bias, where the adapter changes that and the model has it.
        verdict: whether it fits.
        reason: why it does not.
        absent: the model does not have the part at all.
    """

    adapter: Adapter
    part: str
    module: Module | None
    bias: Module | None
    verdict: Verdict
    reason: str = ""
    absent: bool = False


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """A weight that a layer changes.

    Attributes:
        part: denoiser, text_encoder or text_encoder_2.
        key: canonical part-local key of the weight.
        rows: rows of the weight that are changed; None: all.
        up_rows: rows of the layer's up factor that say how; None: all.
        layer: the layer.
        transposed: the weight is the transpose of the layer's.
    """

    part: str
    key: str
    rows: Rows | None
    up_rows: Rows | None
    layer: LoraLayer
    transposed: bool = False


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
        tail: shape of a row of the module.
        adapter: the adapter.
        bias: whether it is the module's bias.
        transposed: the weight is the transpose of the module's, all of it.
    """

    part: str
    key: str
    spans: tuple[Span, ...]
    rows: int
    tail: Shape
    adapter: Adapter
    bias: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class AdapterMatch:
    """Which adapters fit; `placed` in file order."""

    placed: tuple[Placed, ...]

    @property
    def fitting(self) -> tuple[Placed, ...]:
        """Adapters that fit."""
        return tuple(one for one in self.placed if one.verdict == "matched")

    @property
    def absent(self) -> tuple[Named, ...]:
        """(name, part) of adapters for parts that the model does not have."""
        return tuple((one.adapter.name, one.part) for one in self.placed if one.absent)

    @property
    def unmatched(self) -> tuple[Named, ...]:
        """(name, reason) of adapters that the model has no weight for."""
        return tuple(
            (one.adapter.name, one.reason)
            for one in self.placed
            if one.verdict == "unmatched" and not one.absent
        )

    @property
    def mismatched(self) -> tuple[Named, ...]:
        """(name, reason) of adapters whose weight has another shape."""
        return tuple(
            (one.adapter.name, one.reason) for one in self.placed if one.verdict == "shape_mismatch"
        )

    @property
    def targets(self) -> tuple[AdapterTarget, ...]:
        """What the adapters that fit change; that of a fused module may be several weights."""
        return tuple(target for one in self.fitting for target in _targets(one))


def match_lora(
    layers: Sequence[LoraLayer], architecture: Architecture, parts: Mapping[str, Shapes]
) -> LoraMatch:
    """Match layers with the weights of a model.

    Args:
        layers: as parsed.
        architecture: the model's.
        parts: part name -> canonical part-local key -> shape, norms and biases included.
    """
    found = match_adapters([layer.adapter for layer in layers], model_with(architecture, parts))
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
        yield LoraTarget(target.part, target.key, rows, up, layer, target.transposed)


def match_adapters(adapters: Sequence[Adapter], model: Model) -> AdapterMatch:
    """Find the module of each adapter of any kind; no two may mean the same rows.

    Whether what fits can also be merged is told by `obstacle`.
    """
    taken: dict[tuple[str, Piece], str] = {}
    placed = []
    for adapter in adapters:
        one = _place(adapter, model)
        if one.verdict == "matched":
            rows = [(one.part, piece) for side in _sides_of(one) for piece in side.pieces]
            if other := next((taken[row] for row in rows if row in taken), ""):
                why = f"{other} already means the same weight"
                one = Placed(adapter, one.part, one.module, one.bias, "unmatched", why)
            else:
                taken.update(dict.fromkeys(rows, adapter.name))
        placed.append(one)
    return AdapterMatch(tuple(placed))


def obstacle(placed: Placed) -> str:
    """Why an adapter that fits cannot be merged; empty where it can."""
    if why := refusal(placed.adapter):
        return why
    keys = {piece.key for side in _sides_of(placed) for piece in side.pieces}
    if reach_of(placed.adapter) == WHOLE and len(keys) > 1:
        label = placed.adapter.label
        return f"its rows are {len(keys)} weights here, and {label} mixes rows"
    return ""


def _place(adapter: Adapter, model: Model) -> Placed:
    if adapter.naming == "counted":
        why = "its layers are numbered, and the shapes do not tell which is which"
        return Placed(adapter, adapter.part, None, None, "unmatched", why)
    if adapter.part and adapter.part not in model.parts:
        why = f"the model has no {adapter.part}"
        return Placed(adapter, adapter.part, None, None, "unmatched", why, absent=True)
    searched = _searched(adapter.part, model)
    name = next((part.name for part in searched if _named(adapter, part)), "")
    if not name:
        why = f"the {adapter.part or 'model'} has no such layer"
        if model.known and adapter.kind == "norm":
            why = "published models are known without their norms: give the model"
        return Placed(adapter, adapter.part, None, None, "unmatched", why)
    part = model.parts[name]
    module, bias = _lookup(adapter, part, bias=False), _lookup(adapter, part, bias=True)
    verdict, why = _judged(adapter, model, part, module, bias)
    changed = bias if has_bias_change(adapter) else None
    return Placed(adapter, name, module, changed, verdict, why)


def _searched(part: str, model: Model) -> list[Part]:
    """Parts in which a name is looked for.

    Trainers count text encoders differently: a name that the one has not is looked for in the
    others. Files that name no part mean any.
    """
    if part == "denoiser":
        return [model.parts[part]]
    first = [model.parts[part]] if part else []
    return first + [
        one
        for one in model.parts.values()
        if one.name != part and (not part or one.name.startswith("text_encoder"))
    ]


def _named(adapter: Adapter, part: Part) -> bool:
    """Whether a part has a module of that name, or a bias, if that is what is changed."""
    return any(
        adapter.module in (names.underscored if adapter.naming == "underscored" else names.dotted)
        for names in (part.weights, part.biases)
    )


def _lookup(adapter: Adapter, part: Part, *, bias: bool) -> Module | None:
    names = part.biases if bias else part.weights
    index = names.underscored if adapter.naming == "underscored" else names.dotted
    return index.get(adapter.module)


def _judged(
    adapter: Adapter, model: Model, part: Part, module: Module | None, bias: Module | None
) -> tuple[Verdict, str]:
    """Hold both things an adapter may change against the model."""
    for is_bias in _sides(adapter):
        found = bias if is_bias else module
        if is_bias and found is None and (adapter.kind == "ia3" or model.known):
            continue  # PEFT scales a bias where there is one; the table of models has none
        if found is None:
            names = part.biases if is_bias else part.weights
            spelled = {**names.dotted, **names.underscored}
            what = "bias in this layer" if is_bias else "such layer"
            why = f"the {part.name} has no {what}"
            if adapter.module in spelled:
                why = "the name means more than one weight"
            return "unmatched", why
        if not found.pieces:
            return "unmatched", "the model keeps these numbers in another order than rows"
        if why := bias_misfit(adapter, found.shape[0]) if is_bias else misfit(adapter, found):
            return "shape_mismatch", why
    return "matched", ""


def _sides_of(placed: Placed) -> tuple[Module, ...]:
    """The modules of what is changed: weight, bias or both."""
    wanted = ((placed.bias if is_bias else placed.module) for is_bias in _sides(placed.adapter))
    return tuple(one for one in wanted if one is not None)


def _sides(adapter: Adapter) -> tuple[bool, ...]:
    """Which of weight (False) and bias (True) an adapter changes."""
    weight, bias = has_weight_change(adapter), has_bias_change(adapter)
    return (*((False,) if weight else ()), *((True,) if bias else ()))


def _targets(placed: Placed) -> Iterator[AdapterTarget]:
    """One target for each weight, and bias, that holds rows of the module."""
    for is_bias in _sides(placed.adapter):
        module = placed.bias if is_bias else placed.module
        if module is None:
            continue
        spans: dict[str, list[Span]] = {}
        at = 0
        for piece in module.pieces:
            spans.setdefault(piece.key, []).append(Span(piece.start, piece.stop, at))
            at += piece.stop - piece.start
        for key, found in spans.items():
            yield AdapterTarget(
                placed.part,
                key,
                tuple(found),
                module.shape[0],
                module.shape[1:],
                placed.adapter,
                is_bias,
                module.transposed,
            )


def looks_like(layers: Sequence[LoraLayer]) -> tuple[str, ...]:
    """Architectures that a LoRA seems made for, the likeliest first; empty when nothing tells."""
    guess = guess_base([layer.adapter for layer in layers])
    return () if guess.architecture == UNKNOWN else (guess.architecture, *guess.also)
