"""verify(): does a file hold what its source holds? Load, tensors, image; then one verdict.

- *load*: the candidate opens, is the same architecture, and has every weight of its source.
- *tensors*: every weight decoded and compared in canonical space. Relative RMSE up to 1.5 times the
  format's Gaussian value passes, up to 3 times warns, beyond or non-finite fails.
- *image*: both sides generate the same prompts and seeds in float32. Squared error is pooled over
  all pairs; beside it stand the noise floor (the source's denoiser in bfloat16) and a control that
  must fail (control.py). Pictures that are black, flat, noise or not finite fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffquant.convert.detect import PartMatch, to_canonical
from diffquant.convert.jobs import opened
from diffquant.convert.logical import LogicalSource
from diffquant.convert.rules import Assignment
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.quant.formats import FORMATS, matrix_shape
from diffquant.quant.metrics import ErrorStats, verdict_of
from diffquant.runtime.control import damaged
from diffquant.runtime.judges import Pair, Pooled, defects, ssim
from diffquant.runtime.opening import Opened, open_pipeline

__all__ = [
    "LEVELS",
    "ImageReport",
    "ImageSettings",
    "LoadReport",
    "Pictures",
    "Reference",
    "TensorError",
    "TensorsReport",
    "VerifyReport",
    "compare_pictures",
    "make_reference",
    "verify",
    "worst_of",
]

LEVELS = ("load", "tensors", "image")
_ROWS_AT_ONCE = 1 << 22  # weights compared at once
_WORST = 10
_ORDER = ("pass", "warn", "fail")
DEFAULT_PROMPTS = ("a photo of a red fox in the snow", "a bowl of fruit on a wooden table")


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far one weight is from its source."""

    key: str
    part: str
    stored: str
    error: float
    verdict: str


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Whether the candidate opens and is complete; `problems` say what is not."""

    verdict: str
    architecture: str
    weights: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorsReport:
    """Weight errors: the worst first, and relative RMSE over all quantized weights."""

    verdict: str
    error: float | None
    compared: int
    worst: tuple[TensorError, ...]


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What is generated on both sides.

    Attributes:
        prompts, seeds: every prompt with every seed.
        steps, cfg, guidance, sampler, size: None takes the model's defaults.
        min_psnr: gate in dB; also what the control must stay below.
    """

    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 12
    cfg: float | None = None
    guidance: float | None = None
    sampler: str | None = None
    size: tuple[int, int] | None = None
    min_psnr: float = 25.0
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class ImageReport:
    """Pictures compared; see the module docstring. `control_block` is what the control damaged."""

    verdict: str
    psnr_db: float | None
    identical: bool
    interval_db: tuple[float, float] | None
    ssim: float
    worst_psnr_db: float | None
    noise_floor_psnr_db: float | None
    control_psnr_db: float | None
    control_block: str
    min_psnr_db: float
    pairs: tuple[Pair, ...]
    reference: str
    candidate: str
    size: tuple[int, int]
    steps: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The verdict and what it rests on; levels that were not run are None."""

    level: str
    verdict: str
    load: LoadReport
    tensors: TensorsReport | None = None
    image: ImageReport | None = None
    warnings: tuple[str, ...] = ()
    pictures: Pictures | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures themselves, for grids and pages; not part of any JSON."""

    reference: tuple[NDArray[np.float32], ...]
    candidate: tuple[NDArray[np.float32], ...]


def worst_of(verdicts: Sequence[str]) -> str:
    """The worst verdict of several; pass when there is none."""
    return max(verdicts, key=_ORDER.index, default="pass")


def verify(
    candidate: Path,
    against: Path,
    *,
    level: str = "image",
    settings: ImageSettings | None = None,
    base: Path | None = None,
    vae: Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> VerifyReport:
    """Judge `candidate` against the source it was made from.

    Args:
        candidate: any file or folder we read.
        against: its source.
        level: load, tensors or image; each includes the ones before.
        settings: for the image level.
        base: where the candidate's missing parts come from; default: `against`.
        vae: VAE file used on both sides.
        progress: told about compared weights and pictures.

    Raises:
        DiffquantError: a side cannot be read or run at all.
    """
    load, tensors = _weights_level(candidate, against, level, progress)
    verdicts = [load.verdict, *([tensors.verdict] if tensors else [])]
    if level != "image" or load.verdict == "fail":
        return VerifyReport(level, worst_of(verdicts), load, tensors)
    image, pictures, warnings = compare_pictures(
        candidate, against, settings or ImageSettings(), base=base, vae=vae, progress=progress
    )
    verdicts.append(image.verdict)
    return VerifyReport(level, worst_of(verdicts), load, tensors, image, warnings, pictures)


def _weights_level(
    candidate: Path, against: Path, level: str, progress: Progress
) -> tuple[LoadReport, TensorsReport | None]:
    with opened(against) as (_, left, source), opened(candidate) as (_, right, found):
        problems = []
        if source.architecture != found.architecture:
            problems.append(f"expected {source.architecture}, found {found.architecture}")
        pairs = []
        have = {part.name: part for part in found.parts}
        reference = {part.name: part for part in source.parts}
        for name, part in have.items():
            if name not in reference:
                problems.append(f"the source has no {name}")
                continue
            paired, missing = _pair(reference[name], part)
            pairs += [(name, a, b) for a, b in paired]
            problems += missing
        if "denoiser" not in have:
            problems.append("no denoiser")
        verdict = "fail" if problems else "pass"
        load = LoadReport(verdict, found.architecture, len(pairs), tuple(problems))
        if level == "load" or problems:
            return load, None
        return load, _compare_weights(left, right, pairs, progress)


def _pair(
    reference: PartMatch, part: PartMatch
) -> tuple[list[tuple[Assignment, Assignment]], list[str]]:
    """Match canonical weights of both sides; what is missing or reshaped is a problem."""
    ours = {a.target: a for a in to_canonical(part)}
    paired, problems = [], []
    for theirs in to_canonical(reference):
        mine = ours.pop(theirs.target, None)
        if mine is None:
            problems.append(f"{part.name}: {theirs.target} is missing")
        elif matrix_shape(mine.shape) != matrix_shape(theirs.shape):
            problems.append(
                f"{part.name}: {theirs.target} expected {theirs.shape}, found {mine.shape}"
            )
        else:
            paired.append((theirs, mine))
    problems += [f"{part.name}: {key} is not in the source" for key in ours]
    return paired, problems


def _compare_weights(
    left: LogicalSource,
    right: LogicalSource,
    pairs: Sequence[tuple[str, Assignment, Assignment]],
    progress: Progress,
) -> TensorsReport:
    rows = []
    squared, size = 0.0, 0
    progress.start("compare", sum(int(np.prod(a.shape, dtype=np.int64)) for _, a, _ in pairs), "w")
    for part, theirs, mine in pairs:
        tensor = right.tensors[mine.pieces[0].key]
        if not tensor.is_float:
            continue
        stats = ErrorStats()
        n, k = matrix_shape(theirs.shape)
        step = max(_ROWS_AT_ONCE // max(k, 1), 1)
        for start in range(0, n, step):
            span = (start, min(start + step, n))
            stats.add(_rows(left, theirs, span), _rows(right, mine, span))
            progress.advance((span[1] - start) * k, theirs.target)
        stored = tensor.format or tensor.dtype.lower()
        error = stats.relative_rmse
        verdict = verdict_of(error, FORMATS[stored].gaussian_error if stored in FORMATS else 0.0)
        rows.append(TensorError(theirs.target, part, stored, error, verdict))
        if tensor.is_quantized:
            squared += error**2 * n * k
            size += n * k
    progress.stop()
    worst = sorted(rows, key=lambda row: (-_ORDER.index(row.verdict), -row.error))
    return TensorsReport(
        verdict=worst_of([row.verdict for row in rows]),
        error=(squared / size) ** 0.5 if size else None,
        compared=len(rows),
        worst=tuple(worst[:_WORST]),
    )


def _rows(
    logical: LogicalSource, assignment: Assignment, rows: tuple[int, int]
) -> NDArray[np.float32]:
    """Rows of a canonical weight as (R, K) float32, whatever pieces it is stored in."""
    n, k = matrix_shape(assignment.shape)
    if len(assignment.shape) < 2 or assignment.transpose:
        found = []
        for piece in assignment.pieces:
            values = logical.read(piece.key)
            shape = logical.tensors[piece.key].shape
            flat = values.reshape(shape[0] if shape else 1, -1)
            found.append(flat[piece.start : piece.stop])
        whole = np.concatenate(found)
        return (whole.T if assignment.transpose else whole).reshape(n, k)[rows[0] : rows[1]]
    found, at = [], 0
    for piece in assignment.pieces:
        length = piece.stop - piece.start
        start, stop = max(rows[0] - at, 0), min(rows[1] - at, length)
        if start < stop:
            found.append(logical.read(piece.key, (piece.start + start, piece.start + stop)))
        at += length
    return np.concatenate(found).reshape(rows[1] - rows[0], k)


def compare_pictures(
    candidate: Path,
    against: Path,
    settings: ImageSettings,
    *,
    base: Path | None = None,
    vae: Path | None = None,
    progress: Progress = NO_PROGRESS,
    reference: Reference | None = None,
) -> tuple[ImageReport, Pictures, tuple[str, ...]]:
    """Generate with both sides and judge; `reference` reuses what `make_reference` returned."""
    if reference is None:
        reference = make_reference(against, settings, vae=vae, progress=progress)
    settings = replace(settings, size=reference.size)
    mine = open_pipeline(
        candidate,
        base=base or against,
        vae=vae,
        dtype=getattr(torch, settings.dtype),
        device=settings.device,
    )
    pictures = _generate(mine, settings, "candidate", progress)
    one = replace(settings, prompts=settings.prompts[:2], seeds=settings.seeds[:1])
    control = _control(reference, mine, one, len(settings.seeds), progress, rows=False)
    if control.psnr_db is None or control.psnr_db >= settings.min_psnr:
        control = _control(reference, mine, one, len(settings.seeds), progress, rows=True)
    return (
        _judge(reference, pictures, control, settings, str(candidate), str(against)),
        Pictures(reference.pictures, pictures),
        mine.warnings,
    )


@dataclass(frozen=True, slots=True)
class _Control:
    """What the damaged copy reached, and what was damaged."""

    psnr_db: float | None
    block: str


def _control(
    reference: Reference,
    mine: Opened,
    settings: ImageSettings,
    stride: int,
    progress: Progress,
    *,
    rows: bool,
) -> _Control:
    """Generate with one block damaged; `stride` is how many pictures the reference has a prompt."""
    pooled = Pooled()
    with damaged(mine.pipeline.parts.denoiser, rows=rows) as block:
        for index, other in enumerate(_generate(mine, settings, "control", progress)):
            pooled.add(reference.pictures[index * stride], other)
    return _Control(pooled.psnr_db, f"{'rows' if rows else 'scales'} of {block} shuffled")


@dataclass(frozen=True, slots=True)
class Reference:
    """The source's pictures and its noise floor, generated once for any number of candidates."""

    pictures: tuple[NDArray[np.float32], ...]
    noise_floor_psnr_db: float | None
    size: tuple[int, int]


def make_reference(
    against: Path,
    settings: ImageSettings,
    *,
    base: Path | None = None,
    vae: Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> Reference:
    """Generate with the source in float32, and again with its denoiser in bfloat16."""
    dtype = getattr(torch, settings.dtype)
    source = open_pipeline(against, base=base, vae=vae, dtype=dtype, device=settings.device)
    settings = replace(settings, size=settings.size or source.size)
    pictures = _generate(source, settings, "reference", progress)
    rough = open_pipeline(
        against,
        base=base,
        vae=vae,
        dtype=dtype,
        device=settings.device,
        denoiser_dtype=torch.bfloat16,
    )
    pooled = Pooled()
    for exact, other in zip(
        pictures, _generate(rough, settings, "noise floor", progress), strict=True
    ):
        pooled.add(exact, other)
    assert settings.size is not None
    return Reference(pictures, pooled.psnr_db, settings.size)


def _generate(
    side: Opened, settings: ImageSettings, label: str, progress: Progress
) -> tuple[NDArray[np.float32], ...]:
    """One picture per prompt and seed, prompts outermost."""
    width, height = settings.size or side.size
    pictures = []
    progress.start(label, len(settings.prompts) * len(settings.seeds) * settings.steps, "step")
    for prompt in settings.prompts:
        for seed in settings.seeds:
            made = side.pipeline.generate(
                prompt,
                seed=seed,
                steps=settings.steps,
                cfg=settings.cfg,
                guidance=settings.guidance,
                sampler=settings.sampler,
                width=width,
                height=height,
                on_step=lambda _done, _total: progress.advance(1),
            )
            pictures.append(made.images[0].numpy())
    progress.stop()
    return tuple(pictures)


def _judge(
    reference: Reference,
    pictures: Sequence[NDArray[np.float32]],
    control: _Control,
    settings: ImageSettings,
    candidate: str,
    against: str,
) -> ImageReport:
    pooled = Pooled()
    named = [(prompt, seed) for prompt in settings.prompts for seed in settings.seeds]
    pairs = []
    for (prompt, seed), exact, other in zip(named, reference.pictures, pictures, strict=True):
        one = Pooled()
        one.add(exact, other)
        pooled.add(exact, other)
        pairs.append(Pair(prompt, seed, one.psnr_db, ssim(exact, other), defects(other)))
    problems = [f"{p.prompt!r} seed {p.seed}: {', '.join(p.defects)}" for p in pairs if p.defects]
    identical = pooled.squared == 0
    gate = settings.min_psnr
    value = pooled.psnr_db
    if not identical and not (value is not None and value >= gate):
        problems.append(f"psnr {value:.2f} dB is below the gate of {gate:g} dB")
    broken_db = control.psnr_db
    if broken_db is None or broken_db >= gate:
        problems.append(
            f"the control ({control.block}) reached "
            f"{'identity' if broken_db is None else f'{broken_db:.2f} dB'}: this gate cannot fail"
        )
    return ImageReport(
        verdict="fail" if problems else "pass",
        psnr_db=value,
        identical=identical,
        interval_db=pooled.interval_db(),
        ssim=float(np.mean([pair.ssim for pair in pairs])),
        worst_psnr_db=min((p.psnr_db for p in pairs if p.psnr_db is not None), default=None),
        noise_floor_psnr_db=reference.noise_floor_psnr_db,
        control_psnr_db=broken_db,
        control_block=control.block,
        min_psnr_db=gate,
        pairs=tuple(pairs),
        reference=against,
        candidate=candidate,
        size=reference.size,
        steps=settings.steps,
        problems=tuple(problems),
    )
