"""What model an adapter file was made for, by the names and shapes of what it adapts.

Each known model is asked how many of the file's layers it has, by name and number, and how many in
that shape. Shapes decide; where no model has them (a smaller or pruned one), names do. Of models
that fit alike the one is preferred all of whose blocks, or all of whose layers, the file has; then
the one the header claims; then the older. The others are told: they cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from diffquant.convert.lora.bases import Base, bases
from diffquant.convert.lora.encoders import Encoder, alone, encoder_of
from diffquant.convert.lora.group import Adapter
from diffquant.convert.lora.kinds import WeightShape
from diffquant.convert.rules import Shape
from diffquant.convert.templates import template

__all__ = ["UNKNOWN", "BaseGuess", "Fit", "guess_base", "same_shape"]

_MOST = 0.8  # share of layers that make a model's shapes, or names, the file's
UNKNOWN = "unknown"
_FLAT = ("loha", "lokr")


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model suits the layers of a file.

    Attributes:
        base: the model.
        named: layers it has by name and number.
        fitting: of these, in that shape.
        columns: of those named, layers that read as wide an input: the text's width tells members
            of a family where the other widths are nobody's.
        formal: of those named, layers written with as many dimensions: a 1x1 kernel is no matrix.
        complete: the file has every block of each kind of layer it has at all.
        exhaustive: the file has every kind of layer of the blocks it touches.
        own: the file uses the architecture's own names, not Diffusers'.
    """

    base: Base
    named: int
    fitting: int
    columns: int
    formal: int
    complete: bool
    exhaustive: bool
    own: bool


@dataclass(frozen=True, slots=True)
class BaseGuess:
    """What a file was made for.

    Attributes:
        architecture: slug, or "unknown".
        variant: where one member of the family alone fits; "base" is said as "".
        variants: every member that fits alike.
        fit: of the model that was chosen; None for text encoders alone, and unknown ones.
        also: other architectures that fit as well.
        encoders: part -> the text encoder it is, where the file touches one.
        evidence: what was concluded from what.
        candidates: the nearest, where nothing fits: slug -> what does not.
    """

    architecture: str
    variant: str = ""
    variants: tuple[str, ...] = ()
    fit: Fit | None = None
    also: tuple[str, ...] = ()
    encoders: Mapping[str, Encoder] | None = None
    evidence: tuple[str, ...] = ()
    candidates: Mapping[str, tuple[str, ...]] | None = None


class _Layer(NamedTuple):
    numbers: tuple[int, ...]
    shape: WeightShape
    flat: bool  # kernels are written as matrices


# (template, underscored) -> the file's layers of that kind
_Layers: TypeAlias = dict[tuple[str, bool], list[_Layer]]


def guess_base(adapters: Sequence[Adapter], claimed: Sequence[str] = ()) -> BaseGuess:
    """Recognise the base model.

    Args:
        adapters: as grouped.
        claimed: architectures the header names; they only choose among what fits alike.
    """
    counted = [one for one in adapters if _counts(one)]
    denoiser = [one for one in counted if one.part in ("", "denoiser")]
    layers = _layers(denoiser)
    encoders = _encoders(counted)
    fits = [fit for base in _with_names(layers) if (fit := _fit(base, layers))]
    best = max((fit.fitting for fit in fits), default=0)
    if best >= _MOST * len(denoiser) and best:
        return _by_shapes(fits, len(denoiser), claimed, encoders)
    named = max((fit.named for fit in fits), default=0)
    if named >= _MOST * len(denoiser) and named:
        return _by_names(fits, len(denoiser), claimed, encoders)
    bare = [one for one in counted if not one.part]
    if not denoiser or (bare and len(bare) == len(denoiser)):
        if bare and (encoder := encoder_of(bare)) is not None:
            encoders = {"text_encoder": encoder, **encoders}
        if encoders:
            return _by_encoders(encoders, counted, claimed)
    return BaseGuess(
        UNKNOWN,
        encoders=encoders,
        candidates=_nearest(fits, len(denoiser)),
        evidence=(f"no known model has most of these {len(denoiser)} layers",) if denoiser else (),
    )


def _counts(adapter: Adapter) -> bool:
    """Whether a layer is a matrix or kernel: norms, tables and lone biases tell no width."""
    if adapter.kind in ("norm", "embedding"):
        return False
    return adapter.kind != "full" or any(
        len(adapter.shapes[role]) > 1 for role in ("diff", "set_weight") if role in adapter.shapes
    )


def _layers(adapters: Sequence[Adapter]) -> _Layers:
    found: _Layers = {}
    for one in adapters:
        module, shape = one.module, one.shape
        if module.endswith(".linear1_qkv"):  # USO: the upper rows of linear1
            module, shape = module.removesuffix("_qkv"), (None, *shape[1:])
        text, numbers = template(module)
        flat = len(shape) < 2 or None in shape or (one.kind in _FLAT and len(shape) == 2)
        kind = found.setdefault((text, one.naming == "underscored"), [])
        kind.append(_Layer(numbers, shape, flat))
    return found


def _with_names(layers: _Layers) -> list[Base]:
    """Models that have at least half as many of the layers' names as the one that has most."""
    counts = {
        base: sum(
            len(kind)
            for (text, underscored), kind in layers.items()
            if base.has(text, underscored=underscored)
        )
        for base in bases()
        if base.is_denoiser
    }
    most = max(counts.values())
    return [base for base, count in counts.items() if 2 * count >= most]


def _fit(base: Base, layers: _Layers) -> Fit | None:
    """Compare a model with the layers; None where it has none of them."""
    named = fitting = columns = formal = own = 0
    complete = True
    seen: set[tuple[str, bool]] = set()
    for (text, underscored), kind in layers.items():
        weights = base.weights(text, underscored=underscored)
        hits = [(one, weights[one.numbers]) for one in kind if one.numbers in weights]
        if not hits:
            continue
        seen.add((text, underscored))
        named += len(hits)
        own += len(hits) if base.is_own(text, underscored=underscored) else 0
        columns += sum(one.shape[1:2] == shape[1:2] for one, shape in hits)
        formal += sum(one.flat or len(one.shape) == len(shape) for one, shape in hits)
        fitting += sum(one.shape == shape or same_shape(one.shape, shape) for one, shape in hits)
        complete = complete and len({one.numbers for one, _ in hits}) == len(weights)
    if not named:
        return None
    return Fit(
        base=base,
        named=named,
        fitting=fitting,
        columns=columns,
        formal=formal,
        complete=complete,
        exhaustive=_exhaustive(base, seen, own=2 * own >= named),
        own=2 * own >= named,
    )


def _exhaustive(base: Base, seen: Set[tuple[str, bool]], *, own: bool) -> bool:
    """Whether the file has every kind of layer that the touched stacks of blocks have."""
    flat = next(iter(seen))[1]
    mine = {text for text, _ in seen}
    stacks = {text.split("#")[0] for text in mine if "#" in text}
    whole = {
        text
        for text in base.templates(own=own, underscored=flat)
        if "#" in text and text.split("#")[0] in stacks
    }
    return whole <= mine


def same_shape(found: WeightShape, expected: Shape) -> bool:
    """Whether a weight may have this shape; kernels may be written flat, 1x1 ones as matrices."""
    if not found or found[0] not in (None, expected[0]):
        return False
    inner, tail = found[1:], expected[1:]
    if not inner or inner[0] is None:
        return True
    if len(inner) == 1:
        return inner[0] in (math.prod(tail), tail[0] if math.prod(tail[1:]) == 1 else None)
    return _trimmed(inner) == _trimmed(tail)


def _trimmed(shape: WeightShape) -> WeightShape:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _by_shapes(
    fits: Sequence[Fit], total: int, claimed: Sequence[str], encoders: Mapping[str, Encoder]
) -> BaseGuess:
    best = max(fit.fitting for fit in fits)
    alike = _preferred([fit for fit in fits if fit.fitting == best])
    chosen = _choose(alike, claimed)
    text = f"{best} of {total} layers have the names and shapes of {_title(chosen)}"
    return _guess(chosen, alike, encoders, [text])


def _by_names(
    fits: Sequence[Fit], total: int, claimed: Sequence[str], encoders: Mapping[str, Encoder]
) -> BaseGuess:
    best = max(fit.named for fit in fits)
    alike = _preferred([fit for fit in fits if fit.named == best])
    chosen = _choose(alike, claimed)
    text = (
        f"{best} of {total} layers have the names of {_title(chosen)}, {chosen.fitting} of them "
        "in its shapes: the model has other widths"
    )
    return _guess(chosen, alike, encoders, [text])


def _preferred(fits: Sequence[Fit]) -> list[Fit]:
    """Of models that have as many layers, those that are more like the file in form."""
    marks = [(fit.columns, fit.formal, fit.complete, fit.exhaustive) for fit in fits]
    return [fit for fit, mark in zip(fits, marks, strict=True) if mark == max(marks)]


def _choose(alike: Sequence[Fit], claimed: Sequence[str]) -> Fit:
    return next((fit for fit in alike if fit.base.architecture in claimed), alike[0])


def _title(fit: Fit) -> str:
    return " ".join(filter(None, (fit.base.architecture, fit.base.variant)))


def _guess(
    chosen: Fit, alike: Sequence[Fit], encoders: Mapping[str, Encoder], evidence: list[str]
) -> BaseGuess:
    slug = chosen.base.architecture
    variants = tuple(
        dict.fromkeys(fit.base.variant for fit in alike if fit.base.architecture == slug)
    )
    also = tuple(dict.fromkeys(fit.base.architecture for fit in alike))
    also = tuple(one for one in also if one != slug)
    if chosen.complete:
        evidence.append("every block is adapted")
    if len(variants) > 1:
        evidence.append(f"fits {', '.join(filter(None, variants))} alike: the header cannot tell")
    if also:
        evidence.append(f"fits {', '.join(also)} as well: the header cannot tell")
    evidence += [f"{part}: {one.evidence}" for part, one in encoders.items()]
    variant = variants[0] if len(variants) == 1 and variants[0] != "base" else ""
    return BaseGuess(slug, variant, variants, chosen, also, encoders, tuple(evidence))


def _by_encoders(
    encoders: Mapping[str, Encoder], adapters: Sequence[Adapter], claimed: Sequence[str]
) -> BaseGuess:
    """Text encoders alone: the families that have them."""
    families = alone([one.kind for one in encoders.values()], [one.name for one in adapters])
    slug = next((one for one in families if one in claimed), next(iter(families), UNKNOWN))
    also = tuple(one for one in families if one != slug)
    evidence = ["only text encoders are adapted"]
    evidence += [f"{part}: {one.evidence}" for part, one in encoders.items()]
    if also:
        evidence.append(f"{', '.join(also)} have these encoders as well: the header cannot tell")
    return BaseGuess(slug, also=also, encoders=encoders, evidence=tuple(evidence))


def _encoders(adapters: Sequence[Adapter]) -> dict[str, Encoder]:
    parts = dict.fromkeys(one.part for one in adapters if one.part.startswith("text_encoder"))
    found = {
        part: encoder_of([one for one in adapters if one.part == part]) for part in sorted(parts)
    }
    return {part: one for part, one in found.items() if one is not None}


def _nearest(fits: Sequence[Fit], total: int) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for fit in sorted(fits, key=lambda one: (-one.fitting, -one.named, one.base.index)):
        text = f"has {fit.named} of {total} layers by name, {fit.fitting} by shape"
        found.setdefault(fit.base.architecture, (text,))
    return dict(list(found.items())[:3])
