"""compare_pictures(): the image level. Both sides generate the same prompts and seeds in float32.

Both run in the same engine, so that a file is judged in the program that will load it. Squared
error is pooled over all pairs. Beside it stand the noise floor (the source's denoiser in bfloat16
against itself in float32) and a control that must fail (control.py): the candidate with one block
damaged; engines that cannot be asked for either say so. A picture that is black, flat, noise or
not finite fails, unless the source draws it no better: then the prompt judges nothing, and the
verdict is a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.compute import Mode
from diffquant.runtime.engines import EngineFiles, Side, open_side
from diffquant.runtime.judges import Pair, Pooled, defects, ssim
from diffquant.runtime.request import PictureRequest

__all__ = [
    "DEFAULT_PROMPTS",
    "ImageReport",
    "ImageSettings",
    "Pictures",
    "Reference",
    "compare_pictures",
    "make_reference",
]

DEFAULT_PROMPTS = ("a photo of a red fox in the snow", "a bowl of fruit on a wooden table")


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What is generated on both sides.

    Attributes:
        prompts, seeds: every prompt with every seed.
        steps, cfg, guidance, sampler, size: None takes the model's defaults.
        min_psnr: gate in dB; also what the control must stay below.
        loras: (file, weight) attached to the candidate, and not to its source.
        engine: program that draws both sides, a key of ENGINES.
        compute: what the candidate's denoiser multiplies in; its source's is computed exactly.
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
    loras: tuple[tuple[Path, float], ...] = ()
    engine: str = "bundled"
    compute: Mode = "exact"


@dataclass(frozen=True, slots=True)
class ImageReport:
    """Pictures compared; see the module docstring.

    Attributes:
        control_block: what the control damaged, or why there was none.
        engine: the program that drew, with its version.
        how: who read the candidate, the program or diffquant for it.
    """

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
    engine: str = ""
    how: str = ""


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures themselves, for grids and pages; not part of any JSON."""

    reference: tuple[NDArray[np.float32], ...]
    candidate: tuple[NDArray[np.float32], ...]


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
    files = EngineFiles(
        candidate,
        base or against,
        vae,
        settings.loras,
        settings.dtype,
        settings.device,
        settings.compute,
    )
    mine = open_side(settings.engine, files)
    pictures = _generate(mine, settings, "candidate", progress)
    one = replace(settings, prompts=settings.prompts[:2], seeds=settings.seeds[:1])
    control = _control(reference, mine, one, len(settings.seeds), progress, rows=False)
    if control.psnr_db is None or control.psnr_db >= settings.min_psnr:
        control = _control(reference, mine, one, len(settings.seeds), progress, rows=True)
    report = _judge(reference, pictures, control, settings, str(candidate), str(against))
    report = replace(report, engine=mine.engine, how=mine.how)
    return report, Pictures(reference.pictures, pictures), mine.warnings


@dataclass(frozen=True, slots=True)
class _Control:
    """What the damaged copy reached, what was damaged, and whether anything could be."""

    psnr_db: float | None
    block: str
    ran: bool = True


def _control(
    reference: Reference,
    mine: Side,
    settings: ImageSettings,
    stride: int,
    progress: Progress,
    *,
    rows: bool,
) -> _Control:
    """Generate with one block damaged; `stride` is how many pictures the reference has a prompt."""
    pooled = Pooled()
    with mine.damaged(rows=rows) as said:
        if said is None:
            return _Control(None, f"{mine.engine} gives no access to weights", ran=False)
        for index, other in enumerate(_generate(mine, settings, "control", progress)):
            pooled.add(reference.pictures[index * stride], other)
    return _Control(pooled.psnr_db, said)


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
    files = EngineFiles(against, base, vae, (), settings.dtype, settings.device)
    source = open_side(settings.engine, files)
    settings = replace(settings, size=settings.size or source.size)
    assert settings.size is not None
    pictures = _generate(source, settings, "reference", progress)
    pooled = Pooled()
    with source.rough() as rough:
        if rough is None:
            return Reference(pictures, None, settings.size)
        for exact, other in zip(
            pictures, _generate(rough, settings, "noise floor", progress), strict=True
        ):
            pooled.add(exact, other)
    return Reference(pictures, pooled.psnr_db, settings.size)


def _generate(
    side: Side, settings: ImageSettings, label: str, progress: Progress
) -> tuple[NDArray[np.float32], ...]:
    """One picture per prompt and seed, prompts outermost."""
    width, height = settings.size or side.size
    pictures = []
    progress.start(label, len(settings.prompts) * len(settings.seeds) * settings.steps, "step")
    for prompt in settings.prompts:
        for seed in settings.seeds:
            request = PictureRequest(
                prompt,
                seed=seed,
                steps=settings.steps,
                cfg=settings.cfg,
                guidance=settings.guidance,
                sampler=settings.sampler,
                width=width,
                height=height,
            )
            made = side.draw(request, lambda _done, _total: progress.advance(1))
            pictures.append(made[0])
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
    pairs: list[Pair] = []
    failures: list[str] = []
    doubts: list[str] = []
    for (prompt, seed), exact, other in zip(named, reference.pictures, pictures, strict=True):
        one = Pooled()
        one.add(exact, other)
        pooled.add(exact, other)
        found = defects(other)
        pairs.append(Pair(prompt, seed, one.psnr_db, ssim(exact, other), found))
        if found:
            told = f"{prompt!r} seed {seed}: {', '.join(found)}"
            shared = set(found) <= set(defects(exact))
            (doubts if shared else failures).append(
                f"{told}, as the source's own: use another prompt" if shared else told
            )
    identical = pooled.squared == 0
    gate, value = settings.min_psnr, pooled.psnr_db
    if not identical and not (value is not None and value >= gate):
        failures.append(f"psnr {value:.2f} dB is below the gate of {gate:g} dB")
    if not control.ran:
        doubts.append(f"no failing control: {control.block}")
    elif control.psnr_db is None or not control.psnr_db < gate:
        reached = "identity" if control.psnr_db is None else f"{control.psnr_db:.2f} dB"
        failures.append(f"the control ({control.block}) reached {reached}: this gate cannot fail")
    return ImageReport(
        verdict="fail" if failures else "warn" if doubts else "pass",
        psnr_db=value,
        identical=identical,
        interval_db=pooled.interval_db(),
        ssim=float(np.mean([pair.ssim for pair in pairs])),
        worst_psnr_db=min((p.psnr_db for p in pairs if p.psnr_db is not None), default=None),
        noise_floor_psnr_db=reference.noise_floor_psnr_db,
        control_psnr_db=control.psnr_db,
        control_block=control.block,
        min_psnr_db=gate,
        pairs=tuple(pairs),
        reference=against,
        candidate=candidate,
        size=reference.size,
        steps=settings.steps,
        problems=(*failures, *doubts),
    )
