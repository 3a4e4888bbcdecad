"""generate_pictures(): one call from paths and options to PNGs with their parameters.

What is not asked for comes from the preset, and what that leaves open from the model. The options
that decided a picture are in it afterwards; `recipe` repeats one that was read back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.facts_of_run import facts_of
from diffquant.runtime.hires import again, enlarged
from diffquant.runtime.job import (
    Job,
    differences,
    files_of,
    further,
    pictures_of,
    request_for,
    settings_for,
)
from diffquant.runtime.judges import defects
from diffquant.runtime.lora import LoraUse, attach
from diffquant.runtime.opening import Opened, PartOrigin, open_pipeline
from diffquant.runtime.parameters import save_png, save_preview
from diffquant.runtime.pipeline import Generated, OnLatents
from diffquant.runtime.precision import (
    Hooks,
    chosen_dtype,
    decode_finite,
    denoise_finite,
    slow_here,
)
from diffquant.runtime.presets import Preset
from diffquant.runtime.preview import Show, shower
from diffquant.runtime.refine import parted
from diffquant.runtime.request import PictureRequest

__all__ = ["Made", "generate_pictures", "numbered"]

_PREVIEWS = 10  # previews of a run, at most


@dataclass(frozen=True, slots=True)
class Made:
    """What a run made and from what.

    Attributes:
        outputs: the pictures.
        parameters: of each, as embedded.
        origins: of the parts.
        loras: what became of each.
        preset: what was chosen, None for none.
        seconds: phase -> wall time.
        warnings: sentences for people.
    """

    outputs: tuple[Path, ...]
    parameters: tuple[Mapping[str, Any], ...]
    origins: tuple[PartOrigin, ...]
    loras: tuple[LoraUse, ...]
    preset: Preset | None
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]


@dataclass(slots=True)
class _Run:
    """State of a run: phases timed and shown, warnings gathered."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    current: str = ""
    started: float = 0.0

    def enter(self, name: str, total: int = 1, unit: str = "part") -> None:
        """Begin a phase; the one before it ends."""
        self.leave()
        self.current, self.started = name, time.perf_counter()
        self.progress.start(name, total, unit)

    def leave(self) -> None:
        """End the phase there is; its time adds up over runs of one name."""
        if self.current:
            self.progress.stop()
            took = time.perf_counter() - self.started
            self.seconds[self.current] = round(self.seconds.get(self.current, 0.0) + took, 3)
            self.current = ""


def numbered(output: Path, count: int) -> tuple[Path, ...]:
    """Names of `count` pictures: out.png alone, else out-1.png, out-2.png, ... of one width."""
    if count == 1:
        return (output,)
    digits = len(str(count))
    return tuple(
        output.with_name(f"{output.stem}-{i:0{digits}d}{output.suffix}")
        for i in range(1, count + 1)
    )


def generate_pictures(job: Job, progress: Progress = NO_PROGRESS) -> Made:
    """Open a model, attach LoRAs, generate pictures and save them.

    Raises:
        DiffquantError: a part, a size, a LoRA or a value that does not fit; one line each.
    """
    run = _Run(progress)
    try:
        return _generate(job, run)
    finally:
        run.leave()


def _generate(job: Job, run: _Run) -> Made:
    asked = {**(dict(job.recipe.fields) if job.recipe else {}), **job.fields}
    if not asked.get("prompt") and asked.get("prompt") != "":
        raise UsageError("no prompt: give one with -p")
    dtype = chosen_dtype(
        job.dtype if job.dtype != "auto" else asked.get("dtype", "auto"), job.device
    )
    pictures = pictures_of(job)
    run.warnings += slow_here(dtype, job.device)
    run.enter("load")
    opened = _opened(job, job.model, dtype)
    uses = attach(opened, job.loras)
    extra = {path: _opened(job, path, dtype) for path in further(job)}
    files = files_of(job)
    run.warnings += [*opened.warnings, *differences(job.recipe, files, uses)]
    preset, settings, said = settings_for(job, opened, asked)
    run.warnings += said
    request = request_for(job, opened, settings, pictures)
    shown = _previews(job, opened, run)
    made = _generated(job, opened, extra, request, settings, shown, run)
    paths = numbered(job.output, len(made.images))
    facts = facts_of(
        request,
        settings,
        files,
        sampler=made.sampler,
        cfg=opened.pipeline.cfg if request.cfg is None else request.cfg,
        dtype=dtype,
        preset=preset.name if preset and preset.name != "default" else "none",
    )
    embedded = []
    run.enter("save", len(paths), "picture")
    for path, image, seed in zip(paths, made.images, made.seeds, strict=True):
        picture = image.numpy()
        run.warnings += [f"{path.name} looks {word}" for word in defects(picture)]
        embedded.append({**facts, "seed": seed})
        save_png(path, picture, embedded[-1])
        run.progress.advance(1)
    run.leave()
    run.warnings += [f"the prompt was cut: {text!r}" for text in made.truncated]
    for use in uses:
        run.warnings += use.warnings
    return Made(
        paths,
        tuple(embedded),
        opened.origins,
        uses,
        preset,
        run.seconds,
        tuple(dict.fromkeys(run.warnings)),
    )


def _opened(job: Job, path: Path, dtype: str) -> Opened:
    """Open a model; only the main one takes --base and --add."""
    main = path == job.model
    return open_pipeline(
        path,
        base=job.base if main else None,
        added=job.added if main else None,
        dtype=getattr(torch, dtype),
        device=job.device,
    )


def _previews(job: Job, opened: Opened, run: _Run) -> OnLatents | None:
    """What writes OUT.preview.png, the picture as the model sees it, at most ten times a run."""
    if job.preview is None:
        return None
    show: Show = shower(opened.architecture, opened.pipeline.parts.vae, job.preview.tiny)
    path = job.output.with_name(f"{job.output.stem}.preview.png")

    def on_latents(index: int, total: int, latents: Tensor) -> None:
        if (index + 1) % max(1, -(-total // _PREVIEWS)) == 0 or index + 1 == total:
            save_preview(path, show(latents))

    return on_latents


def _generated(
    job: Job,
    opened: Opened,
    extra: Mapping[Path, Opened],
    request: PictureRequest,
    settings: Mapping[str, Any],
    shown: OnLatents | None,
    run: _Run,
) -> Generated:
    """The picture, its refiner and its second pass."""

    def hooks(label: str) -> Hooks:
        def on_phase(name: str, steps: int) -> None:
            run.enter(label if name == "denoise" else name, steps, "step" if steps > 1 else "part")

        return Hooks(
            on_phase=on_phase,
            on_step=lambda _done, _total: run.progress.advance(1),
            on_latents=shown if label == "denoise" else None,
            warn=run.warnings.append,
        )

    pipeline, last, label = opened.pipeline, request, "denoise"
    if job.refiner is None:
        found = denoise_finite(pipeline, request, hooks=hooks(label))
    else:
        refiner = extra[job.refiner].pipeline
        switch = settings["refiner_switch"]
        first, last = parted(pipeline, refiner, request, switch=switch)
        left = denoise_finite(pipeline, first, hooks=hooks(label)).latents
        pipeline, label = refiner, "refine"
        found = denoise_finite(pipeline, last, latents=left, hooks=hooks(label))
    images = decode_finite(pipeline, last, found.latents, hooks(label))
    if "hires" in settings:
        model = extra[job.hires_model] if job.hires_model is not None else opened
        larger = again(
            model.pipeline,
            request,
            images,
            size=enlarged(model.pipeline, request, settings["hires"]),
            strength=settings["hires_strength"],
            same=model is opened,
        )
        found = denoise_finite(model.pipeline, larger, hooks=hooks("hires"))
        images = decode_finite(model.pipeline, larger, found.latents, hooks("hires"))
    elif job.hires_model is not None:
        raise UsageError("--hires-model needs --hires, such as --hires 2")
    return Generated(
        images, found.latents.cpu(), found.sampler, found.calls, found.truncated, request.seeds
    )
