"""recommend(): which type to write for a device and a program, from what was measured.

Every type is planned as `quantize` would write it; the plan says its size, the fit arithmetic
(convert/footprint) what a picture takes with it, the loaders' rules who reads it (by the very
header that would be written), and the formats' measured errors what rounding costs. Nothing is
read but the header.

A row is recommended when the device holds the denoiser while it runs and a program reads the file.
Among these less error comes first. What streams its blocks comes after, the least to copy first;
what does not fit or nobody reads is listed with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from diffquant.convert.allocation_options import usual_formats
from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.generic import GENERIC
from diffquant.convert.footprint import Footprint, Picture, footprint, with_denoiser
from diffquant.convert.footprint.denoiser import denoise_stage, denoising_nbytes, others_over
from diffquant.convert.footprint.native import native_size
from diffquant.convert.footprint.weights import plan_weights
from diffquant.convert.losses import keeps_numbers
from diffquant.convert.match import to_canonical
from diffquant.convert.plan import Plan, Request, make_plan
from diffquant.convert.sensitivity import Sensitivity
from diffquant.convert.targets import TARGETS
from diffquant.core.errors import DiffquantError, UsageError
from diffquant.inspect.fit import FitLevel, levels_of
from diffquant.inspect.loaders import LoaderVerdict, check_loader, loader_report
from diffquant.inspect.planned import planned_subject
from diffquant.inspect.speeds import CARDS, speed_class
from diffquant.inspect.subject import Subject
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES, QuantType

__all__ = ["RecommendReport", "Recommendation", "recommend"]

_READS = ("accepts", "caveat")
_OURS = "diffquant"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One type in one container.

    Attributes:
        type, container: what `quantize` is asked for.
        target: program it would be written for.
        nbytes: of the denoiser.
        bits_per_weight: of the denoiser.
        error: expected: relative error of the weights, from the formats' own on Gaussian weights;
            with a sensitivity its predicted sum. None where it cannot be told.
        level: of offloading, the first at which every part fits; "" where none does.
        peak_nbytes: while the denoiser runs, all of it on the device and the other parts off it,
            the device's own context included.
        resident: whether that fits; else its blocks are streamed.
        speed: class of decoding.
        loaders: programs that read it.
        conditional: those of them that do so on a condition (`inspect --for NAME` says which).
        reason: why it is not recommended; "" where it is.
    """

    type: str
    container: str
    target: str = ""
    nbytes: int = 0
    bits_per_weight: float = 0.0
    error: float | None = None
    level: str = ""
    peak_nbytes: int = 0
    resident: bool = False
    speed: str = ""
    loaders: tuple[str, ...] = ()
    conditional: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RecommendReport:
    """Ranked rows, and those that are not recommended.

    Attributes:
        vram_nbytes: of the device.
        loader: the program that must read it, "" for any.
        card: generation that speeds are of.
        errors: what `error` is, in words.
        rows: the best first.
        others: with reasons.
        notes: what was assumed.
        no_mix: why `quantize --vram` makes no mix of this source for this device; "" where it does.
    """

    path: str
    architecture: str
    variant: str
    width: int
    height: int
    vram_nbytes: int
    loader: str
    card: str
    errors: str
    rows: tuple[Recommendation, ...]
    others: tuple[Recommendation, ...]
    notes: tuple[str, ...]
    no_mix: str = ""


@dataclass(frozen=True, slots=True)
class _Asked:
    subject: Subject
    found: Footprint
    vram: int
    loader: str
    card: str
    sensitivity: Sensitivity | None


def recommend(
    subject: Subject,
    *,
    vram: int,
    loader: str = "",
    card: str = "hopper",
    sensitivity: Sensitivity | None = None,
) -> RecommendReport:
    """Rank the types that a model can be written in.

    Args:
        subject: an opened source, not yet quantized.
        vram: bytes of the device.
        loader: program that has to read the file, a key of LOADERS; "" for any but this one.
        card: generation of the card, for speeds.
        sensitivity: predicted errors, for ranking by them.

    Raises:
        UnknownFormat: no such program.
        UsageError: a subject without a denoiser of a known architecture, or a sensitivity of
            another one.
    """
    if loader:
        check_loader(loader)
    match = subject.match
    if match is None or match.part("denoiser") is None:
        raise UsageError(f"{subject.path}: {subject.kind}, and no model to recommend a type for")
    if match.architecture not in ARCHITECTURES or match.architecture == GENERIC.slug:
        raise UsageError(
            f"{subject.path}: what {match.architecture} takes on a device is not known"
        )
    if sensitivity is not None and sensitivity.architecture != match.architecture:
        raise UsageError(
            f"the sensitivity is of {sensitivity.architecture}, the source is {match.architecture}"
        )
    denoiser = match.part("denoiser")
    keys = {one.target for one in to_canonical(denoiser)} if denoiser is not None else set()
    if sensitivity is not None and not keys & sensitivity.errors.keys():
        raise UsageError("the sensitivity knows none of the tensors: it is of another model")
    width, height = native_size(match)
    found = footprint(subject.logical, match, Picture(width, height))
    if denoise_stage(found) is None:
        raise UsageError(f"{subject.path}: what its denoiser takes is not known")
    asked = _Asked(subject, found, vram, loader, card, sensitivity)
    rows = [_row(asked, kind, container) for kind, container in _offers(loader)]
    good = sorted((one for one in rows if not one.reason), key=_rank)
    return RecommendReport(
        path=subject.path,
        architecture=match.architecture,
        variant=match.variant,
        width=width,
        height=height,
        vram_nbytes=vram,
        loader=loader,
        card=card,
        errors=sensitivity.unit if sensitivity is not None else "relative error of the weights",
        rows=tuple(good),
        others=tuple(one for one in rows if one.reason),
        notes=(*_notes(asked, good), *found.notes),
        no_mix=_no_mix(asked, good),
    )


def _offers(loader: str) -> Iterator[tuple[QuantType, str]]:
    """Types and containers; those that the named program reads where that is known."""
    target = TARGETS.get(loader)
    for kind in TYPES.values():
        if kind.name == "f32":
            continue
        for container in kind.dialects:
            if target is None or loader == _OURS or container in target.reads:
                yield kind, container


def _row(asked: _Asked, kind: QuantType, container: str) -> Recommendation:
    subject = asked.subject
    assert subject.match is not None
    row = Recommendation(kind.name, container)
    target = asked.loader if asked.loader in TARGETS and asked.loader != _OURS else ""
    try:
        request = Request(container, type=kind, target=target)
        plan = make_plan(subject.logical, subject.match, request)
        planned = planned_subject(plan, subject.match, subject.source, "planned")
    except DiffquantError as error:
        return replace(row, reason=str(error))
    verdicts = {one.loader: one for one in loader_report(planned)}
    steps = plan.part_steps("denoiser")
    weights = plan_weights(steps, compute=asked.found.picture.compute)
    whole = with_denoiser(asked.found, weights)
    level, peak = _level(asked, whole), denoising_nbytes(whole)
    stored = [(step.stored, step.parameters) for step in steps]
    reads = tuple(name for name, one in verdicts.items() if one.verdict in _READS)
    return replace(
        row,
        target=plan.target,
        nbytes=sum(step.nbytes for step in steps),
        bits_per_weight=plan.bits_per_weight(),
        error=_error(asked, plan),
        level=level.name if level is not None else "",
        peak_nbytes=peak,
        resident=peak <= asked.vram,
        speed=speed_class(asked.card, stored),
        loaders=reads,
        conditional=tuple(name for name in reads if verdicts[name].verdict == "caveat"),
        reason=_unpacked(kind, stored) or _refused(asked, verdicts, reads, whole, peak),
    )


def _level(asked: _Asked, whole: Footprint) -> FitLevel | None:
    """The first level of offloading at which all of a picture fits."""
    return next((one for one in levels_of(whole, asked.vram) if one.fits), None)


def _error(asked: _Asked, plan: Plan) -> float | None:
    steps = plan.part_steps("denoiser")
    if asked.sensitivity is not None:
        known = asked.sensitivity.errors
        packed = [
            step
            for step in steps
            if step.key in known and not keeps_numbers(asked.subject.logical, step)
        ]
        found = [known[step.key].get(step.stored) for step in packed]
        numbers = [value for value in found if value is not None]
        return math.fsum(numbers) if found and len(numbers) == len(found) else None
    noise = sum(
        step.parameters * FORMATS[step.stored].gaussian_error ** 2
        for step in steps
        if step.stored in FORMATS and not keeps_numbers(asked.subject.logical, step)
    )
    return math.sqrt(noise / max(sum(step.parameters for step in steps), 1))


def _unpacked(kind: QuantType, stored: Sequence[tuple[str, int]]) -> str:
    """Why a type is none of this model's: nothing of it would be quantized."""
    if FORMATS[kind.base].is_cast or any(
        name in FORMATS and not FORMATS[name].is_cast for name, _ in stored
    ):
        return ""
    return f"no weight of this model has a shape that {kind.name} can hold"


def _refused(
    asked: _Asked,
    verdicts: Mapping[str, LoaderVerdict],
    reads: Sequence[str],
    whole: Footprint,
    peak: int,
) -> str:
    """Why a row is not recommended."""
    if asked.loader and asked.loader not in reads:
        one = verdicts[asked.loader]
        told = one.reasons[0].text if one.reasons else "nothing is known of such a file"
        return f"{asked.loader}: {told}"
    if not asked.loader and not set(reads) - {_OURS}:
        return "no program but diffquant is known to read it"
    if peak > asked.vram and _level(asked, whole) is None:
        least = min(levels_of(whole, asked.vram), key=lambda one: one.nbytes)
        needs = least.nbytes / (1 << 30)
        return f"does not fit: {needs:.2f} GiB at the least ({least.name}, {least.decided_by})"
    return ""


def _rank(row: Recommendation) -> tuple[bool, float, int]:
    """On the device first, by error and size; of streamed ones, what is copied for each step."""
    if not row.resident:
        return True, 0.0, row.nbytes
    return False, math.inf if row.error is None else row.error, row.nbytes


def _no_mix(asked: _Asked, rows: Sequence[Recommendation]) -> str:
    """Why bits cannot be allocated: a second rounding, or no choice that stays on the device."""
    assert asked.subject.match is not None
    denoiser = asked.subject.match.part("denoiser")
    assert denoiser is not None
    tensors = asked.subject.logical.tensors
    names = {denoiser.prefix + key for key in denoiser.shapes}
    packed = sorted(
        {tensors[key].format for key in names & tensors.keys() if tensors[key].is_quantized}
    )
    if packed:
        told = ", ".join(one or "an unknown format" for one in packed)
        return f"the denoiser is already quantized ({told}): choose from its unquantized source"
    fitting = [row for row in rows if row.resident]
    if not fitting:
        return "no type leaves the whole denoiser on the device"
    if not any(TYPES[row.type].base in usual_formats(row.container) for row in fitting):
        smaller = ", ".join(dict.fromkeys(row.type for row in fitting))
        return f"mixes are of larger types than {smaller} (`quantize --among` names smaller ones)"
    return ""


def _notes(asked: _Asked, rows: Sequence[Recommendation]) -> Iterator[str]:
    measured = CARDS.get(asked.card)
    if measured is None:
        yield f"speeds: no {asked.card} card was measured"
    else:
        yield f"speeds are of this package's decoders on an {measured} (docs/gpu.md)"
    if any(row.resident for row in rows):
        yield from others_over(asked.found, asked.vram)
