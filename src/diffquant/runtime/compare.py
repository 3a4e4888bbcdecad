"""compare_pictures(): the image level. Both sides generate the same prompts and seeds in float32.

Squared error is pooled over all pairs. Beside it stand the noise floor (the source's denoiser in
bfloat16 against itself in float32) and a control that must fail (control.py): the candidate with
one block damaged. A picture that is black, flat, noise or not finite fails, unless the source
draws it no
better: then the prompt judges nothing, and the verdict is a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.control import damaged
from diffquant.runtime.judges import Pair, Pooled, defects, ssim
from diffquant.runtime.lora import attach
from diffquant.runtime.opening import Opened, open_pipeline

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
    mine = open_pipeline(
        candidate,
        base=base or against,
        vae=vae,
        dtype=getattr(torch, settings.dtype),
        device=settings.device,
    )
    uses = attach(mine, settings.loras)
    pictures = _generate(mine, settings, "candidate", progress)
    one = replace(settings, prompts=settings.prompts[:2], seeds=settings.seeds[:1])
    control = _control(reference, mine, one, len(settings.seeds), progress, rows=False)
    if control.psnr_db is None or control.psnr_db >= settings.min_psnr:
        control = _control(reference, mine, one, len(settings.seeds), progress, rows=True)
    return (
        _judge(reference, pictures, control, settings, str(candidate), str(against)),
        Pictures(reference.pictures, pictures),
        (*mine.warnings, *(text for use in uses for text in use.warnings)),
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
    if control.psnr_db is None or not control.psnr_db < gate:
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
