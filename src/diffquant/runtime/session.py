"""generate_pictures(): one call from paths and options to PNGs with their parameters.

What is not asked for comes from the preset, and what that leaves open from the model. The options
that decided a picture are in it afterwards; `recipe` repeats one that was read back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.facts_of_run import Files, facts_of, hash_of_file, hash_of_model
from diffquant.runtime.judges import defects
from diffquant.runtime.lora import LoraUse, attach
from diffquant.runtime.opening import Opened, PartOrigin, open_pipeline
from diffquant.runtime.parameters import save_png, save_preview
from diffquant.runtime.pictures import enlarged, picture_file
from diffquant.runtime.pipeline import Generated, OnLatents
from diffquant.runtime.precision import chosen_dtype, run_finite, slow_here
from diffquant.runtime.presets import Clues, LoraClue, Preset, contradictions, preset_named
from diffquant.runtime.preview import Show, shower
from diffquant.runtime.recipe import Recipe
from diffquant.runtime.request import PictureRequest

__all__ = ["FIELDS", "Job", "Made", "Preview", "generate_pictures", "numbered"]

# Options that describe a picture, as Job.fields and a Recipe name them; `size` is (width, height).
FIELDS = (
    "prompt", "negative", "seed", "batch", "steps", "cfg", "cfg_cutoff", "cfg_rescale", "guidance",
    "size", "sampler", "schedule", "shift", "eta", "text_tokens", "clip_skip", "prompt_style",
    "rng", "strength", "refiner_switch", "hires", "hires_strength",
)  # fmt: skip
_DIRECT = tuple(
    one for one in FIELDS if one not in ("size", "refiner_switch", "hires", "hires_strength")
)
_STEPS, _SWITCH, _HIRES_STRENGTH = 20, 0.8, 0.35
_PREVIEWS = 10  # previews of a run, at most


@dataclass(frozen=True, slots=True)
class Preview:
    """A picture of what there is so far: `tiny` is a tiny autoencoder's file, None for colours."""

    tiny: Path | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked for.

    Attributes:
        model: folder, checkpoint or packed file.
        output: PNG; several get numbers (see `numbered`).
        fields: option of FIELDS -> value, those that were given.
        base: where missing parts come from.
        added: part or tokenizer -> file or folder.
        loras: (file, weight).
        image, mask: pictures to start from.
        refiner, hires_model: further models; hires without one uses the model itself.
        device: of torch.
        dtype: "auto", "float32", "bfloat16" or "float16".
        preset: "auto", "none" or a name; None: the recipe's, else "auto".
        preview: None for none.
        recipe: of a picture that is repeated; `fields` win over it.
    """

    model: Path
    output: Path
    fields: Mapping[str, Any]
    base: Path | None = None
    added: Mapping[str, Path] = field(default_factory=dict)
    loras: tuple[tuple[Path, float], ...] = ()
    image: Path | None = None
    mask: Path | None = None
    refiner: Path | None = None
    hires_model: Path | None = None
    device: str = "cpu"
    dtype: str = "auto"
    preset: str | None = None
    preview: Preview | None = None
    recipe: Recipe | None = None


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
    run.warnings += slow_here(dtype, job.device)
    run.enter("load")
    opened = _opened(job, job.model, dtype)
    uses = attach(opened, job.loras)
    extra = {path: _opened(job, path, dtype) for path in _further(job)}
    files = _files(job)
    run.warnings += [*opened.warnings, *_recipe_warnings(job.recipe, files, uses)]
    preset, settings = _settings(job, opened, asked, run)
    request = _request(job, opened, settings)
    shown = _previews(job, opened, run)
    made = _generated(job, opened, extra, request, settings, shown, run)
    seeds = _seeds(request, len(made.images))
    paths = numbered(job.output, len(made.images))
    facts = facts_of(
        request,
        settings,
        files,
        sampler=made.sampler,
        cfg=opened.pipeline.family.cfg if request.cfg is None else request.cfg,
        dtype=dtype,
        preset=preset.name if preset and preset.name != "default" else "none",
    )
    embedded = []
    run.enter("save", len(paths), "picture")
    for path, image, seed in zip(paths, made.images, seeds, strict=True):
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


def _further(job: Job) -> tuple[Path, ...]:
    named = (job.refiner, job.hires_model)
    return tuple(dict.fromkeys(path for path in named if path is not None))


def _files(job: Job) -> Files:
    """Names and hashes of everything the pictures depend on."""
    models = {job.model, *_further(job)}
    return Files(
        model=(job.model.stem if job.model.is_file() else job.model.name, hash_of_model(job.model)),
        parts={
            name: (path.name, hash_of_model(path))
            for name, path in sorted(job.added.items())
            if not name.startswith("tokenizer")
        },
        loras=tuple((path.stem, weight, hash_of_file(path)) for path, weight in job.loras),
        images={
            name: (path.name, hash_of_file(path))
            for name, path in (("image", job.image), ("mask", job.mask))
            if path is not None
        },
        models={
            name: (path.stem if path.is_file() else path.name, hash_of_model(path))
            for name, path in (("refiner", job.refiner), ("hires_model", job.hires_model))
            if path in models and path is not None
        },
    )


def _recipe_warnings(
    recipe: Recipe | None, files: Files, uses: tuple[LoraUse, ...]
) -> Iterator[str]:
    """What differs between a picture that is repeated and this run.

    Raises:
        UsageError: a file that the picture depends on is not given.
    """
    if recipe is None:
        return
    yield from recipe.notes
    given = {**files.images, **files.models}
    missing = [
        f"--{option.replace('_', '-')} ({name})"
        for option, (name, _) in (recipe.files or {}).items()
        if option not in given
    ]
    have = {name for name, _, _ in files.loras} | {digest for _, _, digest in files.loras}
    lost = [one for one in recipe.loras if one.name not in have and one.sha256 not in have]
    missing += [f"--lora {one.name}:{one.weight:g}" for one in lost]
    if missing and recipe.origin == "diffquant":
        raise UsageError(
            f"the picture was made with files that are not given: {', '.join(missing)}"
        )
    for text in missing:
        yield f"the picture was made with a file that is not given: {text}"
    for option, (name, digest) in (recipe.files or {}).items():
        if option in given and digest and given[option][1] != digest:
            yield f"--{option.replace('_', '-')}: another file than {name}, the picture will differ"
    if recipe.fingerprint and recipe.fingerprint != files.model[1]:
        yield f"made with another model ({recipe.model}), the picture will differ"
    elif not recipe.fingerprint and recipe.model:
        yield f"made with a model called {recipe.model}; whether it is this one is not known"
    recorded = {one.name: one.weight for one in recipe.loras}
    for use in uses:
        wanted = recorded.get(Path(use.path).stem)
        if wanted is not None and wanted != use.weight:
            yield f"{Path(use.path).name}: weight {use.weight:g}, {wanted:g} in the picture"


def _settings(
    job: Job, opened: Opened, asked: Mapping[str, Any], run: _Run
) -> tuple[Preset | None, dict[str, Any]]:
    """What was asked for, over what the preset says."""
    clues = _clues(job, opened)
    name = job.preset or asked.get("preset") or ("none" if job.recipe else "auto")
    preset = preset_named(name, clues)
    settings: dict[str, Any] = {}
    if preset is not None and preset.name != "default":
        one = preset.recipe
        settings = {
            "steps": one.steps,
            "cfg": one.cfg,
            "guidance": one.guidance,
            "sampler": one.sampler or None,
            "schedule": preset.schedule,
            "shift": one.shift,
            "eta": one.eta,
        }
        if opened.pipeline.family.flow and "cfg" not in asked and one.cfg <= 1:
            settings["cfg"] = None
        if asked.get("steps", one.steps) != one.steps and not isinstance(preset.schedule, str):
            settings["schedule"] = None  # a list of levels is for its own number of steps
    settings |= {key: value for key, value in asked.items() if value is not None}
    settings.setdefault("steps", _STEPS)
    judged = preset or preset_named("auto", clues)
    cfg = settings.get("cfg")
    if judged is not None:
        run.warnings += contradictions(
            judged,
            clues,
            steps=settings["steps"],
            cfg=opened.pipeline.family.cfg if cfg is None else cfg,
            sampler=settings.get("sampler"),
        )
    return preset, settings


def _clues(job: Job, opened: Opened) -> Clues:
    names = tuple(dict.fromkeys((job.model.stem, job.model.resolve().name)))
    loras = tuple(LoraClue((path.stem,), weight) for path, weight in job.loras)
    config = getattr(opened.pipeline.parts.denoiser, "config", None)
    guided = getattr(config, "guidance", None)
    return Clues(
        opened.architecture,
        opened.variant,
        names,
        guided=guided if isinstance(guided, bool) else None,
        loras=loras,
    )


def _request(job: Job, opened: Opened, settings: Mapping[str, Any]) -> PictureRequest:
    width, height = settings.get("size") or opened.size
    image = mask = None
    if job.image is not None:
        image = picture_file(job.image, "image")
        if "size" not in settings:
            height, width = image.shape[1:3]
        elif image.shape[1:3] != (height, width):
            raise UsageError(
                f"{job.image}: {image.shape[2]}x{image.shape[1]}, the picture is {width}x{height}: "
                "resize it, or leave --size out"
            )
    if job.mask is not None:
        if image is None:
            raise UsageError("--mask needs the picture it belongs to: --image")
        mask = picture_file(job.mask, "mask")
        if mask.shape[1:3] != image.shape[1:3]:
            raise UsageError(
                f"{job.mask}: a mask of {mask.shape[2]}x{mask.shape[1]} for a picture of "
                f"{image.shape[2]}x{image.shape[1]}: they have to be of one size"
            )
    if "strength" in settings and image is None:
        raise UsageError("--strength is of --image, which is not given")
    direct = {key: settings[key] for key in _DIRECT if key in settings}
    return PictureRequest(**direct, width=width, height=height, image=image, mask=mask)


def _seeds(request: PictureRequest, count: int) -> tuple[int, ...]:
    if isinstance(request.seed, int):
        return tuple(request.seed + i for i in range(count))
    return request.seed


def _previews(job: Job, opened: Opened, run: _Run) -> OnLatents | None:
    """What writes OUT.preview.png, at most ten times a run."""
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

    def once(
        one: Opened, asked: PictureRequest, label: str = "", latents: Tensor | None = None
    ) -> Generated:
        def on_phase(name: str, steps: int) -> None:
            name = label if label and name == "denoise" else name
            run.enter(name, steps, "step" if steps > 1 else "part")

        return run_finite(
            one.pipeline,
            asked,
            latents=latents,
            on_step=lambda _done, _total: run.progress.advance(1),
            on_latents=shown if one is opened else None,
            on_phase=on_phase,
            warn=run.warnings.append,
        )

    if job.refiner is None:
        made = once(opened, request)
    else:
        switch = settings.get("refiner_switch", _SWITCH)
        first = once(opened, replace(request, end=switch))
        second = replace(request, begin=switch, image=None, mask=None)
        made = once(extra[job.refiner], second, "refine", first.latents)
    if "hires" in settings:
        model = extra[job.hires_model] if job.hires_model is not None else opened
        made = once(model, _second_pass(request, made, opened, model, settings), "hires")
    elif job.hires_model is not None:
        raise UsageError("--hires-model needs --hires, such as --hires 2")
    return made


def _second_pass(
    request: PictureRequest,
    made: Generated,
    opened: Opened,
    model: Opened,
    settings: Mapping[str, Any],
) -> PictureRequest:
    """Image to image from the enlarged picture, at a size the model takes."""
    pipeline = model.pipeline
    multiple = pipeline.parts.vae.config.factor * pipeline.family.patch
    width, height = (
        max(1, round(side * settings["hires"] / multiple)) * multiple
        for side in (request.width, request.height)
    )
    if model.pipeline.family.flow != opened.pipeline.family.flow:  # names mean other things there
        request = replace(request, sampler=None, schedule=None, shift=None, cfg=None, guidance=None)
    return replace(
        request,
        width=width,
        height=height,
        image=enlarged(made.images, width, height),
        mask=None,
        strength=settings.get("hires_strength", _HIRES_STRENGTH),
        sampler=None
        if model.architecture != model.pipeline.parts.architecture
        else request.sampler,
    )
