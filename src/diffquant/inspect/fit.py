"""fit(): what making a picture with a file takes, and the level of offloading that makes it fit.

From the header alone: bytes of the weights as they are stored, activations by walking the model
(convert/footprint), and the parts that a file lacks as its architecture runs with them. Peak memory
is not file size: the decoder's feature maps and the text encoder often decide.

Not fitting is a fact, not a failure: a report says which level would, and what a smaller type would
change. Whether that is good enough is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffquant.convert.architectures.generic import GENERIC
from diffquant.convert.footprint import CONTEXT_NBYTES as CONTEXTS
from diffquant.convert.footprint import (
    Footprint,
    Picture,
    Stage,
    block_count,
    footprint,
    needs,
    with_denoiser,
)
from diffquant.convert.footprint.native import LARGEST_SIDE, native_size
from diffquant.convert.footprint.weights import plan_weights
from diffquant.convert.plan import Request, make_plan
from diffquant.core.errors import DiffquantError, UsageError
from diffquant.inspect.subject import Subject
from diffquant.quant.types import type_named

__all__ = ["CONTEXT_NBYTES", "FitLevel", "FitReport", "FitStage", "Smaller", "fit", "levels_of"]

# The budget is a GPU's, and Triton decodes there.
CONTEXT_NBYTES = CONTEXTS["cuda"]
_DECODES = "packed weights are decoded by Triton's kernels; without Triton a weight takes more"

_LARGEST_BATCH = 1 << 10
_TYPES = ("q8_0", "q6_k", "q5_k_s", "q4_k_s")


@dataclass(frozen=True, slots=True)
class FitStage:
    """A part at work.

    Attributes:
        name: encode, denoise or decode.
        part, title: which part, for programs and for people.
        in_file: False where the file lacks it and its sizes are those it is published with.
        source: where the sizes come from.
        weights_nbytes: as stored.
        activations_nbytes: most that lives at once, weights aside.
        blocks: how many blocks it can be streamed in.
        scratch_nbytes: what decoding one packed weight takes for a moment.
        largest_label, largest_nbytes: the largest tensor that is no weight.
        tiled_nbytes: activations when decoding in strips; None for other stages.
        host_nbytes: likewise, with feature maps in host memory.
        derivation: how the activations add up, and which weight is decoded.
    """

    name: str
    part: str
    title: str
    in_file: bool
    source: str
    weights_nbytes: int
    blocks: int
    activations_nbytes: int
    scratch_nbytes: int
    largest_label: str
    largest_nbytes: int
    tiled_nbytes: int | None
    host_nbytes: int | None
    derivation: tuple[str, ...]

    @property
    def peak_nbytes(self) -> int:
        """Bytes while this part alone is on the device."""
        return self.weights_nbytes + self.activations_nbytes + self.scratch_nbytes


@dataclass(frozen=True, slots=True)
class FitLevel:
    """A level of offloading.

    Attributes:
        level: none, model, blocks or sequential.
        tiled: whether the decoder works in strips.
        nbytes: smallest budget, what the device takes for itself included.
        decided_by: the stage and part that need most.
        fits: whether a given budget is enough; None without one.
        blocks: blocks of the denoiser that a budget leaves on the device, at level blocks.
    """

    level: str
    tiled: bool
    nbytes: int
    decided_by: str
    fits: bool | None
    blocks: int | None = None

    @property
    def name(self) -> str:
        """Level and strips in words."""
        return f"{self.level} + decoding in strips" if self.tiled else self.level


@dataclass(frozen=True, slots=True)
class Smaller:
    """The same picture with the denoiser in another type.

    Attributes:
        nbytes: of the denoiser.
        level: the first level that fits, "" where none does.
    """

    type: str
    nbytes: int
    level: str


@dataclass(frozen=True, slots=True)
class FitReport:
    """What `diffquant inspect --size` and `--vram` say about one file.

    Attributes:
        reason: why nothing can be said, "" where something can; the rest is empty then.
        vram_nbytes: the budget, None when only sizes were asked for.
        guided: whether classifier-free guidance is counted.
        context_nbytes: what the device takes for itself, in every level's budget.
        level: the first level that fits, "" where none does or no budget was given.
        levels: those that differ, in the order to try.
        advice: smaller types, where the budget asks for offloading or nothing fits.
        notes: what was assumed, and what was left out.
    """

    path: str
    architecture: str
    variant: str
    width: int
    height: int
    batch: int
    compute: str
    vram_nbytes: int | None
    guided: bool
    reason: str
    context_nbytes: int
    level: str
    stages: tuple[FitStage, ...]
    levels: tuple[FitLevel, ...]
    advice: tuple[Smaller, ...]
    notes: tuple[str, ...]


def fit(
    subject: Subject,
    *,
    vram: int | None = None,
    width: int | None = None,
    height: int | None = None,
    batch: int = 1,
    compute: str = "BF16",
) -> FitReport:
    """Say what making a picture with a file takes, and whether a device has it.

    Args:
        subject: an opened file.
        vram: bytes of the device, None to leave the verdict out.
        width: of the picture in pixels; the model's own where not given.
        height: likewise.
        batch: pictures at once.
        compute: STORAGE name of the dtype computed in.

    Raises:
        UsageError: a size, batch or budget out of range.
    """
    width, height = _size(subject, width, height)
    _check(width=width, height=height, batch=batch, vram=vram)
    reason = _reason(subject)
    if reason or subject.match is None:
        return _report(subject, Picture(width, height, batch, compute), vram, reason=reason)
    picture = Picture(width, height, batch, compute)
    found = footprint(subject.logical, subject.match, picture)
    if not found.stages:
        reason = "none of its parts can be estimated: " + "; ".join(found.notes)
        return _report(subject, picture, vram, reason=reason)
    levels = tuple(levels_of(found, vram))
    level = next((one.name for one in levels if one.fits), "")
    notes = [*found.notes, *_encoder_decides(found, levels)]
    if any(stage.scratch for stage in found.stages):
        notes.append(_DECODES)
    advice: tuple[Smaller, ...] = ()
    if vram is not None and level != levels[0].name:
        advice = tuple(_advice(subject, found, vram, notes))
    return _report(
        subject,
        picture,
        vram,
        guided=found.guided,
        level=level,
        stages=tuple(_stage(one) for one in found.stages),
        levels=levels,
        advice=advice,
        notes=tuple(notes),
    )


def _report(
    subject: Subject,
    picture: Picture,
    vram: int | None,
    *,
    guided: bool = False,
    reason: str = "",
    level: str = "",
    stages: tuple[FitStage, ...] = (),
    levels: tuple[FitLevel, ...] = (),
    advice: tuple[Smaller, ...] = (),
    notes: tuple[str, ...] = (),
) -> FitReport:
    match = subject.match
    return FitReport(
        path=subject.path,
        architecture=match.architecture if match else "unknown",
        variant=match.variant if match else "",
        width=picture.width,
        height=picture.height,
        batch=picture.batch,
        compute=picture.compute,
        vram_nbytes=vram,
        guided=guided,
        reason=reason,
        context_nbytes=CONTEXT_NBYTES,
        level=level,
        stages=stages,
        levels=levels,
        advice=advice,
        notes=notes,
    )


def _size(subject: Subject, width: int | None, height: int | None) -> tuple[int, int]:
    """The size asked for, else the one its configs state, else the architecture's."""
    if width is not None and height is not None:
        return width, height
    return native_size(subject.match)


def _check(*, width: int, height: int, batch: int, vram: int | None) -> None:
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise UsageError(f"a picture of {width}x{height}: a side is 1 to {LARGEST_SIDE} pixels")
    if not 0 < batch <= _LARGEST_BATCH:
        raise UsageError(f"a batch of {batch}: expected 1 to {_LARGEST_BATCH}")
    if vram is not None and vram <= 0:
        raise UsageError(f"a device of {vram} bytes: expected more than none, such as 8GiB")


_REASONS = {
    "lora": "a LoRA runs beside its base model: ask for the fit of the base, and add the size of "
    "this file",
    "textual_inversion": "a textual inversion adds a few token vectors: ask for the fit of the "
    "model it is used with",
    "controlnet": "a ControlNet runs beside its base model, which this file does not hold",
}


def _reason(subject: Subject) -> str:
    """Why nothing can be said of a file, "" where something can."""
    if subject.kind in _REASONS:
        return _REASONS[subject.kind]
    if subject.match is None or subject.match.architecture == GENERIC.slug:
        return "its architecture is not known here, and what a picture takes follows from that"
    return ""


def _stage(stage: Stage) -> FitStage:
    weights = stage.weights
    told = [stage.activations.derivation]
    if stage.scratch:
        told.append(f"decoding {weights.scratch.label} takes {stage.scratch / (1 << 20):.1f} MiB")
    if stage.tiled is not None:
        told.append(f"in strips, {stage.tiled.derivation}")
    if stage.host is not None:
        told.append(f"in strips from host memory, {stage.host.derivation}")
    return FitStage(
        name=stage.name,
        part=stage.part,
        title=stage.title,
        in_file=stage.in_file,
        source=stage.source,
        weights_nbytes=weights.nbytes,
        blocks=len(weights.blocks),
        activations_nbytes=stage.activations.nbytes,
        scratch_nbytes=stage.scratch,
        largest_label=stage.largest.label,
        largest_nbytes=stage.largest.each,
        tiled_nbytes=None if stage.tiled is None else stage.tiled.nbytes,
        host_nbytes=None if stage.host is None else stage.host.nbytes,
        derivation=tuple(told),
    )


def levels_of(found: Footprint, vram: int | None) -> Iterator[FitLevel]:
    """Levels in the order to try; one that needs no less than a faster one is left out."""
    least: int | None = None
    for need in needs(found):
        if least is not None and need.nbytes >= least:
            continue
        least = need.nbytes
        total = need.nbytes + CONTEXT_NBYTES
        yield FitLevel(
            level=need.level,
            tiled=need.tiled,
            nbytes=total,
            decided_by=f"{need.stage}: {need.title}",
            fits=None if vram is None else total <= vram,
            blocks=_resident(found, vram) if need.level == "blocks" and vram else None,
        )


def _encoder_decides(found: Footprint, levels: tuple[FitLevel, ...]) -> Iterator[str]:
    """Where a text encoder keeps a part at a time from fitting: what eight bits would change."""
    level = next((one for one in levels if one.level == "model"), None)
    encoders = [one for one in found.stages if one.name == "encode"]
    if level is None or level.fits is not False or not encoders:
        return
    widest = max(encoders, key=lambda one: one.weights.nbytes)
    if level.decided_by.startswith("encode") and not widest.scratch:
        saved = widest.weights.nbytes // 2
        yield (
            f"{widest.title} keeps level model from fitting: in 8 bits it takes about "
            f"{saved / (1 << 30):.1f} GiB less"
        )


def _resident(found: Footprint, vram: int) -> int | None:
    stage = next((one for one in found.stages if one.name == "denoise"), None)
    return block_count(found, stage, vram - CONTEXT_NBYTES) if stage is not None else None


def _advice(subject: Subject, found: Footprint, vram: int, notes: list[str]) -> Iterator[Smaller]:
    """The denoiser in smaller types, as the planner would write it."""
    match = subject.match
    denoise = next((one for one in found.stages if one.name == "denoise"), None)
    if match is None or denoise is None:
        return
    for name in _TYPES:
        try:
            request = Request("gguf", type=type_named(name))
            steps = make_plan(subject.logical, match, request).part_steps("denoiser")
        except DiffquantError as error:
            notes.append(f"sizes of smaller types are left out: {error}")
            return
        weights = plan_weights(steps, compute=found.picture.compute)
        if weights.nbytes >= denoise.weights.nbytes:
            continue
        levels = levels_of(with_denoiser(found, weights), vram)
        level = next((one.name for one in levels if one.fits), "")
        yield Smaller(name, weights.nbytes, level)
