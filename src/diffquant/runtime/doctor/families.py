"""What each published model would take here: the rung of memory it runs on, and what decides it.

The arithmetic is that of any file (convert/footprint) and the planner's (runtime/memory/plan.py):
the denoiser's own names and shapes in the type asked for, text encoders and autoencoder as they are
published, in 16 bits, a picture of the model's native size. No weight is touched, and no torch.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.binding import bind
from diffquant.convert.detect import detect
from diffquant.convert.footprint import Footprint, Picture, footprint, with_denoiser
from diffquant.convert.footprint.decode import Serving, usually
from diffquant.convert.footprint.levels import CONTEXT_NBYTES
from diffquant.convert.footprint.published import Published, published
from diffquant.convert.footprint.weights import plan_weights
from diffquant.convert.plan import Request, make_plan
from diffquant.core.errors import ResourceError
from diffquant.quant.types import type_named
from diffquant.runtime.memory.plan import Budget, Rung, StagePeak, plan_memory
from diffquant.runtime.memory.rungs import candidates, host_nbytes, stage_peaks

__all__ = ["TYPES_SHOWN", "FamilyFit", "TypeFit", "families"]

TYPES_SHOWN = ("bf16", "q8_0", "q4_k_s")  # as published, and the two that people take most
_AS_PUBLISHED = TYPES_SHOWN[0]


@dataclass(frozen=True, slots=True)
class TypeFit:
    """A model with its denoiser in one type.

    Attributes:
        type: of the denoiser.
        denoiser_nbytes: its weights.
        level: none, model, blocks or sequential; the least demanding one where nothing fits.
        decoder: whole, strips or host: how the picture is decoded.
        pinned: whether streamed weights wait in page-locked memory.
        resident: part -> blocks that stay while it is at work, at level blocks.
        peak_nbytes: predicted, with what the device takes for itself.
        host_nbytes: host memory beside a device of its own.
        fits: whether the budget is enough; None where none is known.
        stage, decides: encode, denoise or decode, and the part that needs most then.
        why: what was turned down, and by how much.
    """

    type: str
    denoiser_nbytes: int
    level: str
    decoder: str
    pinned: bool
    resident: Mapping[str, int]
    peak_nbytes: int
    host_nbytes: int
    fits: bool | None
    stage: str
    decides: str
    why: tuple[str, ...]

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


def families(
    budget: Budget, *, device: str, compute: str, backends: Mapping[str, str] | None = None
) -> tuple[FamilyFit, ...]:
    """Plan every published model.

    Args:
        budget: memory that may be taken.
        device: cpu, cuda or mps.
        compute: STORAGE name of the dtype computed in.
        backends: number format -> what decodes it there; what usually does where not given.
    """
    served = tuple(sorted(backends.items())) if backends else ()
    return tuple(_fit(one, budget, device) for one in _estimates(compute, device, served))


def _fit(model: _Estimate, budget: Budget, device: str) -> FamilyFit:
    found = model.types[_AS_PUBLISHED]
    return FamilyFit(
        title=model.published.title,
        repository=model.published.repository,
        architecture=found.architecture,
        variant=found.variant,
        width=found.picture.width,
        height=found.picture.height,
        guided=found.guided,
        types=tuple(_planned(name, one, budget, device) for name, one in model.types.items()),
    )


def _planned(name: str, found: Footprint, budget: Budget, device: str) -> TypeFit:
    """The rung that the planner takes, else the one that needs least of the device."""
    denoiser = next(stage for stage in found.stages if stage.name == "denoise")
    try:
        plan = plan_memory(found, budget, device=device)
        rung, peaks, why = plan.rung, plan.peaks, plan.why
        fits = None if budget.device is None else True
    except ResourceError as error:  # a fact about this machine here, and no failure
        rung, peaks = _least(found, budget, device)
        fits, why = False, (str(error),)
    worst = max(peaks, key=lambda one: one.total)
    return TypeFit(
        type=name,
        denoiser_nbytes=denoiser.weights.nbytes,
        level=rung.level,
        decoder=rung.decoder,
        pinned=rung.pinned,
        resident=rung.resident,
        peak_nbytes=worst.total + CONTEXT_NBYTES[device],
        host_nbytes=host_nbytes(found, rung, device=device),
        fits=fits,
        stage=worst.stage,
        decides=worst.title,
        why=why,
    )


def _least(found: Footprint, budget: Budget, device: str) -> tuple[Rung, tuple[StagePeak, ...]]:
    """The first of the rungs whose peak is smallest."""
    rungs = candidates(found, budget.device, device=device)
    each = [(rung, stage_peaks(found, rung, device=device)) for rung in rungs]
    return min(each, key=lambda one: max(peak.total for peak in one[1]))


@dataclass(frozen=True, slots=True)
class _Estimate:
    """A model, and what its native picture takes in every type."""

    published: Published
    types: Mapping[str, Footprint]


@cache
def _estimates(
    compute: str, device: str, backends: tuple[tuple[str, str], ...]
) -> tuple[_Estimate, ...]:
    known, usual = dict(backends), usually(device)

    def backend(fmt: str) -> str:
        return known.get(fmt) or usual.backend(fmt)

    serving = Serving(backend, usual.copies_kernels)

    # Plans are hundreds of thousands of short-lived rows: with torch loaded, looking for garbage
    # that is not there takes a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return tuple(_Estimate(one, dict(_types(one, compute, serving))) for one in published())
    finally:
        if collecting:
            gc.enable()


def _types(model: Published, compute: str, serving: Serving) -> Iterator[tuple[str, Footprint]]:
    logical = bind(model.header())
    match = detect(logical.specs())
    native = ARCHITECTURES[match.architecture].sampling_for(match.variant)
    picture = Picture(native.width, native.height, compute=compute)
    found = footprint(logical, match, picture, serving=serving, ours=True)
    for name in TYPES_SHOWN:
        if name == _AS_PUBLISHED:
            yield name, found
            continue
        plan = make_plan(logical, match, Request("gguf", type=type_named(name)))
        steps = plan.part_steps("denoiser")
        yield name, with_denoiser(found, plan_weights(steps, compute=compute, serving=serving))
