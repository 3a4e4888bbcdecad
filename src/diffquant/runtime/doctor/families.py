"""What each published model would take here: the rung of memory it runs on, and what decides it.

The arithmetic is that of any file (convert/footprint): the denoiser's own names and shapes in the
type asked for, text encoders and autoencoder as they are published, in 16 bits, a picture of the
model's native size. No weight is touched, and no torch.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.binding import bind
from diffquant.convert.detect import detect
from diffquant.convert.footprint import (
    Footprint,
    Need,
    Picture,
    footprint,
    needs,
    with_denoiser,
)
from diffquant.convert.footprint.published import Published, published
from diffquant.convert.footprint.weights import plan_weights
from diffquant.convert.plan import Request, make_plan
from diffquant.quant.types import type_named

__all__ = ["CONTEXT_NBYTES", "TYPES_SHOWN", "FamilyFit", "TypeFit", "families"]

TYPES_SHOWN = ("bf16", "q8_0", "q4_k_s")  # as published, and the two that people take most
_AS_PUBLISHED = TYPES_SHOWN[0]
# What a device takes before the first tensor, as inspect/fit.py counts it.
CONTEXT_NBYTES = 400 << 20


@dataclass(frozen=True, slots=True)
class TypeFit:
    """A model with its denoiser in one type.

    Attributes:
        type: of the denoiser.
        denoiser_nbytes: its weights.
        level: none, model, blocks or sequential; the least demanding one where nothing fits.
        decoder: whole or strips: how the picture is decoded.
        peak_nbytes: predicted, with what the device takes for itself.
        fits: whether the budget is enough; None where none is known.
        stage, decides: encode, denoise or decode, and the part that needs most then.
    """

    type: str
    denoiser_nbytes: int
    level: str
    decoder: str
    peak_nbytes: int
    fits: bool | None
    stage: str
    decides: str

    @property
    def rung(self) -> str:
        """Level and decoder in words."""
        return self.level if self.decoder == "whole" else f"{self.level}+{self.decoder}"


@dataclass(frozen=True, slots=True)
class FamilyFit:
    """A published model.

    Attributes:
        title, repository: of the model.
        width, height: its native size in pixels.
        guided: whether guidance runs it on two predictions a step.
        types: as TYPES_SHOWN.
    """

    title: str
    repository: str
    architecture: str
    variant: str
    width: int
    height: int
    guided: bool
    types: tuple[TypeFit, ...]


def families(*, budget: int | None, compute: str) -> tuple[FamilyFit, ...]:
    """Plan every published model.

    Args:
        budget: bytes of the device, None where unknown.
        compute: STORAGE name of the dtype computed in.
    """
    return tuple(_fit(one, budget) for one in _estimates(compute))


def _fit(model: _Estimate, budget: int | None) -> FamilyFit:
    found = model.types[_AS_PUBLISHED]
    return FamilyFit(
        title=model.published.title,
        repository=model.published.repository,
        architecture=found.architecture,
        variant=found.variant,
        width=found.picture.width,
        height=found.picture.height,
        guided=found.guided,
        types=tuple(_rung(name, one, budget) for name, one in model.types.items()),
    )


def _rung(name: str, found: Footprint, budget: int | None) -> TypeFit:
    denoiser = next(stage for stage in found.stages if stage.name == "denoise")
    need, fits = _chosen(needs(found), budget)
    return TypeFit(
        type=name,
        denoiser_nbytes=denoiser.weights.nbytes,
        level=need.level,
        decoder="strips" if need.tiled else "whole",
        peak_nbytes=need.nbytes + CONTEXT_NBYTES,
        fits=fits,
        stage=need.stage,
        decides=need.title,
    )


def _chosen(rungs: Sequence[Need], budget: int | None) -> tuple[Need, bool | None]:
    """The first rung that fits, else the one that needs least."""
    if budget is None:
        return rungs[0], None
    hit = next((one for one in rungs if one.nbytes + CONTEXT_NBYTES <= budget), None)
    return (hit, True) if hit else (min(rungs, key=lambda one: one.nbytes), False)


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A model, and what its native picture takes in every type."""

    published: Published
    types: Mapping[str, Footprint]


@cache
def _estimates(compute: str) -> tuple[_Estimate, ...]:
    # Plans are hundreds of thousands of short-lived rows: with torch loaded, looking for garbage
    # that is not there takes a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return tuple(_Estimate(one, dict(_types(one, compute))) for one in published())
    finally:
        if collecting:
            gc.enable()


def _types(model: Published, compute: str) -> Iterator[tuple[str, Footprint]]:
    logical = bind(model.header())
    match = detect(logical.specs())
    native = ARCHITECTURES[match.architecture].sampling_for(match.variant)
    found = footprint(logical, match, Picture(native.width, native.height, compute=compute))
    for name in TYPES_SHOWN:
        if name == _AS_PUBLISHED:
            yield name, found
            continue
        plan = make_plan(logical, match, Request("gguf", type=type_named(name)))
        steps = plan.part_steps("denoiser")
        yield name, with_denoiser(found, plan_weights(steps, compute=compute))
