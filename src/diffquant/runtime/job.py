"""A Job, and what it comes to once the model is open: settings, and the request that is run.

What is asked for wins over the preset, which wins over the model's own. A picture that is repeated
asks for what it says, unless an option says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.facts_of_run import Files, hash_of_file, hash_of_model
from diffquant.runtime.lora import LoraUse
from diffquant.runtime.memory.budget import Asked
from diffquant.runtime.models.unet_config import UNetConfig
from diffquant.runtime.opening import Opened
from diffquant.runtime.pictures import picture_file
from diffquant.runtime.presets import Clues, LoraClue, Preset, contradictions, preset_named
from diffquant.runtime.recipe import Recipe
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.titles import titles_of_file

if TYPE_CHECKING:
    from diffquant.runtime import compute as computing
    from diffquant.runtime.compile_choice import Mode
    from diffquant.runtime.graph_choice import Mode as GraphMode

__all__ = [
    "FIELDS", "HIRES_STRENGTH", "SWITCH", "Job", "Preview", "differences", "files_of", "further",
    "pictures_of", "request_for", "settings_for",
]  # fmt: skip

# Options that describe a picture, as Job.fields and a Recipe name them; `size` is (width, height).
FIELDS = (
    "prompt", "negative", "seed", "batch", "steps", "cfg", "cfg_cutoff", "cfg_rescale", "guidance",
    "size", "sampler", "schedule", "shift", "eta", "text_tokens", "clip_skip", "prompt_style",
    "rng", "strength", "refiner_switch", "hires", "hires_strength",
)  # fmt: skip
_DIRECT = tuple(
    one for one in FIELDS if one not in ("size", "refiner_switch", "hires", "hires_strength")
)
SWITCH, HIRES_STRENGTH = 0.8, 0.35
_DEFAULTS = {"steps": 20, "refiner_switch": SWITCH, "hires_strength": HIRES_STRENGTH}


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
        memory: what may be taken, and how weights are placed.
        compile: whether the denoiser's blocks are compiled, see compile_choice.py.
        graphs: whether the denoiser's calls are replayed, see graph_choice.py.
        compute: what the denoiser's layers multiply in, see compute.py; None: the recipe's, else
            exact.
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
    memory: Asked = field(default_factory=Asked)
    compile: Mode = "auto"
    graphs: GraphMode = "auto"
    compute: computing.Mode | None = None


def further(job: Job) -> tuple[Path, ...]:
    """Models besides the main one."""
    named = (job.refiner, job.hires_model)
    return tuple(dict.fromkeys(path for path in named if path is not None))


def files_of(job: Job) -> Files:
    """Names and hashes of everything the pictures depend on."""
    models = {job.model, *further(job)}
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


def differences(recipe: Recipe | None, files: Files, uses: tuple[LoraUse, ...]) -> Iterator[str]:
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


def settings_for(
    job: Job, opened: Opened, asked: Mapping[str, Any]
) -> tuple[Preset | None, dict[str, Any], tuple[str, ...]]:
    """What was asked for, over what the preset says; and what of it contradicts the model.

    Raises:
        UnknownFormat, UsageError: no such preset, or not for this model.
    """
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
            "schedule": preset.schedule_for(asked.get("steps") or one.steps),
            "shift": one.shift,
            "eta": one.eta,
        }
    settings |= {key: value for key, value in asked.items() if value is not None}
    for key, value in _DEFAULTS.items():
        settings.setdefault(key, value)
    said: tuple[str, ...] = ()
    judged = preset or preset_named("auto", clues)
    cfg = settings.get("cfg")
    if judged is not None:
        said = contradictions(
            judged,
            clues,
            steps=settings["steps"],
            cfg=opened.pipeline.cfg if cfg is None else cfg,
            sampler=settings.get("sampler"),
        )
    return preset, settings, said


def _clues(job: Job, opened: Opened) -> Clues:
    names = tuple(dict.fromkeys((job.model.stem, job.model.resolve().name, *opened.titles)))
    loras = tuple(
        LoraClue((path.stem, *titles_of_file(path)), weight) for path, weight in job.loras
    )
    config = getattr(opened.pipeline.parts.denoiser, "config", None)
    guided = getattr(config, "guidance", None)  # of a UNet its width, of others yes or no
    unet = isinstance(config, UNetConfig)
    return Clues(
        opened.architecture,
        opened.variant,
        names,
        time_cond=unet and guided is not None,
        guided=guided if isinstance(guided, bool) else None,
        loras=loras,
    )


def pictures_of(job: Job) -> dict[str, Tensor]:
    """Read "image" and "mask", before anything large is.

    Raises:
        UsageError, MalformedFile: see `picture_file`; or sizes that do not fit each other.
    """
    found = {}
    if job.image is not None:
        found["image"] = picture_file(job.image, "image")
    if job.mask is not None:
        if "image" not in found:
            raise UsageError("--mask needs the picture it belongs to: --image")
        mask, image = picture_file(job.mask, "mask"), found["image"]
        if mask.shape[1:3] != image.shape[1:3]:
            raise UsageError(
                f"{job.mask}: a mask of {mask.shape[2]}x{mask.shape[1]} for a picture of "
                f"{image.shape[2]}x{image.shape[1]}: they have to be of one size"
            )
        found["mask"] = mask
    return found


def request_for(
    job: Job, opened: Opened, settings: Mapping[str, Any], pictures: Mapping[str, Tensor]
) -> PictureRequest:
    """The request, with the pictures it starts from.

    Raises:
        UsageError: pictures that are missing, or of sizes that do not fit.
    """
    width, height = settings.get("size") or opened.size
    image = pictures.get("image")
    if image is not None:
        if "size" not in settings:
            height, width = image.shape[1:3]
        elif image.shape[1:3] != (height, width):
            raise UsageError(
                f"{job.image}: {image.shape[2]}x{image.shape[1]}, the picture is {width}x{height}: "
                "resize it, or leave --size out"
            )
    if "strength" in settings and image is None:
        raise UsageError("--strength is of --image, which is not given")
    direct = {key: settings[key] for key in _DIRECT if key in settings}
    return PictureRequest(
        **direct, width=width, height=height, image=image, mask=pictures.get("mask")
    )
