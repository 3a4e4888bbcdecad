"""generate_pictures(): one call from paths and options to PNGs with their parameters.

What is not asked for comes from the preset, and what that leaves open from the model. The options
that decided a picture are in it afterwards; `recipe` repeats one that was read back.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.compile_choice import Compiling
from diffquant.runtime.compute import Mode, card_of
from diffquant.runtime.facts_of_run import Files, facts_of
from diffquant.runtime.graph_choice import Graphs
from diffquant.runtime.hires import again
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
from diffquant.runtime.low_bit import LowBit, apply
from diffquant.runtime.memory.budget import capped
from diffquant.runtime.memory.plan import MemoryPlan
from diffquant.runtime.memory.planning import place, plan_run
from diffquant.runtime.opening import Opened, PartOrigin, open_pipeline
from diffquant.runtime.parameters import save_png, save_preview
from diffquant.runtime.passes import Pass, Placed, passes_of, placed, release
from diffquant.runtime.pipeline import Denoised, Generated, OnLatents, OnStep
from diffquant.runtime.precision import (
    Hooks,
    chosen_dtype,
    decode_finite,
    denoise_finite,
    slow_here,
)
from diffquant.runtime.presets import Preset
from diffquant.runtime.preview import Show, shower
from diffquant.runtime.request import PictureRequest

__all__ = ["Made", "Placed", "generate_pictures", "numbered", "plan_pictures"]

_PREVIEWS = 10  # previews of a run, at most


@dataclass(frozen=True, slots=True)
class Made:
    """What a run made and from what; without outputs, what it would be made from.

    Attributes:
        outputs: the pictures.
        parameters: of each, as embedded.
        origins: of the parts.
        loras: what became of each.
        preset: what was chosen, None for none.
        seconds: phase -> wall time.
        warnings: sentences for people.
        memory: of each pass.
        compiling: pass -> whether its blocks were compiled, and why.
        graphs: pass -> how many of its calls were replays of a CUDA graph, or why none.
        computing: pass -> what how many layers were computed in, and why; none: all exactly.
    """

    outputs: tuple[Path, ...]
    parameters: tuple[Mapping[str, Any], ...]
    origins: tuple[PartOrigin, ...]
    loras: tuple[LoraUse, ...]
    preset: Preset | None
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]
    memory: tuple[Placed, ...] = ()
    compiling: Mapping[str, str] = field(default_factory=dict)
    graphs: Mapping[str, str] = field(default_factory=dict)
    computing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Run:
    """State of a run: phases timed and shown, warnings and decisions gathered."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    compiling: dict[str, str] = field(default_factory=dict)
    graphs: dict[str, str] = field(default_factory=dict)
    computing: dict[str, tuple[str, ...]] = field(default_factory=dict)

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


@dataclass(frozen=True, slots=True)
class _Ready:
    """Everything that is known before a weight is read."""

    opened: Opened
    extra: Mapping[Path, Opened]
    uses: tuple[LoraUse, ...]
    files: Files
    preset: Preset | None
    settings: Mapping[str, Any]
    dtype: str
    request: PictureRequest
    passes: tuple[Pass, ...]
    plans: Mapping[str, MemoryPlan]
    low_bit: Mapping[Path, LowBit]


def generate_pictures(job: Job, progress: Progress = NO_PROGRESS) -> Made:
    """Open a model, attach LoRAs, plan its memory, generate pictures and save them.

    Raises:
        DiffquantError: a part, a size, a LoRA or a value that does not fit; one line each.
    """
    run = _Run(progress)
    device = torch.device(job.device)
    try:
        with contextlib.ExitStack() as files, capped(device, job.memory):
            ready = _prepared(job, run, files)
            try:
                return _generate(job, ready, run)
            finally:
                for one in ready.passes:
                    release(one.opened)
    finally:
        run.leave()


def plan_pictures(job: Job, progress: Progress = NO_PROGRESS) -> Made:
    """What `generate_pictures` would make and how it would place it; no weight is read."""
    run = _Run(progress)
    try:
        with contextlib.ExitStack() as files:
            ready = _prepared(job, run, files)
            found = tuple(placed(one, ready.plans[one.label]) for one in ready.passes)
    finally:
        run.leave()
    return _made(ready, run, memory=found)


def _prepared(job: Job, run: _Run, stack: contextlib.ExitStack) -> _Ready:
    """Open, resolve what was asked, and plan; files stay open in `stack`."""
    asked = {**(dict(job.recipe.fields) if job.recipe else {}), **job.fields}
    if not asked.get("prompt") and asked.get("prompt") != "":
        raise UsageError("no prompt: give one with -p")
    dtype = chosen_dtype(
        job.dtype if job.dtype != "auto" else asked.get("dtype", "auto"), job.device
    )
    pictures = pictures_of(job)
    run.warnings += slow_here(dtype, job.device)
    run.enter("load")
    opened = _opened(job, job.model, dtype, stack)
    uses = attach(opened, job.loras)
    extra = {path: _opened(job, path, dtype, stack) for path in further(job)}
    files = files_of(job)
    run.warnings += [*opened.warnings, *differences(job.recipe, files, uses)]
    preset, settings, said = settings_for(job, opened, asked)
    run.warnings += said
    request = request_for(job, opened, settings, pictures)
    passes = tuple(passes_of(job, opened, extra, request, settings))
    low_bit = _low_bit(job.compute or asked.get("compute", "exact"), job.device, passes, run)
    plans = {
        one.label: plan_run(one.opened, one.request, job.memory, extra=low_bit[one.path].nbytes)
        for one in passes
    }
    return _Ready(
        opened, extra, uses, files, preset, settings, dtype, request, passes, plans, low_bit
    )


def _low_bit(mode: Mode, device: str, passes: tuple[Pass, ...], run: _Run) -> dict[Path, LowBit]:
    """How the layers of each model multiply."""
    card, found = card_of(device), {}
    for one in passes:
        if one.path not in found:
            found[one.path] = apply(one.opened.pipeline.parts.denoiser, mode, card)
            run.warnings += found[one.path].warnings
    return found


def _generate(job: Job, ready: _Ready, run: _Run) -> Made:
    opened, request = ready.opened, ready.request
    shown = _previews(job, opened, run)
    made = _generated(job, ready, shown, run)
    paths = numbered(job.output, len(made.images))
    facts = facts_of(
        request,
        ready.settings,
        ready.files,
        sampler=made.sampler,
        cfg=opened.pipeline.cfg if request.cfg is None else request.cfg,
        dtype=ready.dtype,
        preset=ready.preset.name if ready.preset and ready.preset.name != "default" else "none",
        compute=ready.low_bit[job.model].mode,
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
    found = tuple(placed(one, ready.plans[one.label]) for one in ready.passes)
    run.warnings += [step for one in found for step in one.steps]
    return _made(ready, run, outputs=paths, parameters=tuple(embedded), memory=found)


def _made(
    ready: _Ready,
    run: _Run,
    *,
    outputs: tuple[Path, ...] = (),
    parameters: tuple[Mapping[str, Any], ...] = (),
    memory: tuple[Placed, ...],
) -> Made:
    for use in ready.uses:
        run.warnings += use.warnings
    return Made(
        outputs,
        parameters,
        ready.opened.origins,
        ready.uses,
        ready.preset,
        run.seconds,
        tuple(dict.fromkeys(run.warnings)),
        memory,
        run.compiling,
        run.graphs,
        run.computing,
    )


def _opened(job: Job, path: Path, dtype: str, files: contextlib.ExitStack) -> Opened:
    """Open a model; only the main one takes --base and --add."""
    main = path == job.model
    return open_pipeline(
        path,
        base=job.base if main else None,
        added=job.added if main else None,
        dtype=getattr(torch, dtype),
        device=job.device,
        files=files,
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


def _generated(job: Job, ready: _Ready, shown: OnLatents | None, run: _Run) -> Generated:
    """The picture, its refiner and its second pass."""

    def hooks(
        label: str,
        stepped: OnStep = lambda _done, _total: None,
        begin: Callable[[int], None] = lambda _calls: None,
    ) -> Hooks:
        def on_phase(name: str, steps: int) -> None:
            if name == "denoise":
                begin(steps)
            run.enter(label if name == "denoise" else name, steps, "step" if steps > 1 else "part")

        def on_step(done: int, total: int) -> None:
            run.progress.advance(1)
            stepped(done, total)

        return Hooks(
            on_phase=on_phase,
            on_step=on_step,
            on_latents=shown if label == "denoise" else None,
            warn=run.warnings.append,
        )

    def denoised(one: Pass, request: PictureRequest, latents: Tensor | None = None) -> Denoised:
        parts = one.opened.pipeline.parts
        blocks = job.compile == "on"
        graphs = Graphs(job.graphs, parts, job.device, request.steps, compiled=blocks)
        compiling = Compiling(
            job.compile,
            parts,
            job.device,
            lambda what: run.progress.advance(0, what),
            instead="steps are replayed as a CUDA graph" if graphs.possible else "",
            began=graphs.anew,
        )
        with compiling, graphs:
            found = denoise_finite(
                one.opened.pipeline,
                request,
                latents=latents,
                hooks=hooks(one.label, compiling.stepped, graphs.begin),
            )
        run.compiling[one.label] = compiling.said
        run.graphs[one.label] = graphs.said
        if graphs.warning:
            run.warnings.append(graphs.warning)
        if said := ready.low_bit[one.path].said:
            run.computing[one.label] = said
        return found

    passes = {one.label: one for one in ready.passes}

    def begin(label: str) -> Pass:
        """Place the model of a pass; what another one has on the device goes."""
        one = passes[label]
        for other in ready.passes:
            if other.opened is not one.opened:
                release(other.opened)
        place(one.opened, ready.plans[label])
        return one

    last = begin("denoise")
    found = denoised(last, last.request)
    if "refine" in passes:
        last, left = begin("refine"), found.latents
        found = denoised(last, last.request, left)
    images = decode_finite(last.opened.pipeline, last.request, found.latents, hooks(last.label))
    if "hires" in passes:
        last = begin("hires")
        pipeline = last.opened.pipeline
        larger = again(
            pipeline,
            ready.request,
            images,
            size=(last.request.width, last.request.height),
            strength=ready.settings["hires_strength"],
            same=last.opened is ready.opened,
        )
        found = denoised(last, larger)
        images = decode_finite(pipeline, larger, found.latents, hooks("hires"))
    seeds = ready.request.seeds
    return Generated(
        images, found.latents.cpu(), found.sampler, found.calls, found.truncated, seeds
    )
