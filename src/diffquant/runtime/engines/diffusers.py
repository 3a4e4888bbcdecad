"""diffusers as an engine: the library loads the file as its users would, and draws.

A file it can read it reads itself: folders, single files of plain weights, GGUF denoisers. One it
cannot read (scaled fp8, packed 4 bits without a GPU, a width its converter does not know) is
decoded by diffquant into the library's own module; `how` says so, since that proves numbers and
not loading.
Nothing is fetched: configs and tokenizers come from a Diffusers folder.
"""

from __future__ import annotations

import contextlib
import inspect as signatures
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.jobs import opened
from diffquant.convert.match import Match, PartMatch
from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.engines.base import (
    EngineFiles,
    OnLatents,
    OnStep,
    Pictures,
    refuse_swapped,
    refuse_unserved,
    refuse_weights,
)
from diffquant.runtime.engines.damage import shuffled_rows
from diffquant.runtime.engines.decoded import fill
from diffquant.runtime.engines.diffusers_reading import (
    folder_of,
    read_denoiser,
    read_folder,
    read_whole,
    route_of,
)
from diffquant.runtime.families.unet import LCM_GUIDANCE
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.samplers import SAMPLERS

__all__ = ["DiffusersSide", "open_side"]

_SERVED = frozenset(
    {"negative", "seed", "batch", "steps", "cfg", "guidance", "width", "height", "sampler"}
    | {"schedule", "clip_skip", "text_tokens", "prompt_style"}
)
_LARGEST = 4096  # pixels; a config that says more is not followed
# Schedules as options of its schedulers.
_SCHEDULES: Mapping[str, Mapping[str, object]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
}


# Z-Image's pipeline counts guidance from 0, as much more than none: pipelines/z_image.
_COUNTED_FROM_ZERO = ("ZImagePipeline",)
# What stands for no negative prompt where the pipeline would otherwise not be guided at all, and
# the model's card guides: Qwen/Qwen-Image README.md, negative_prompt = " ".
_NOTHING = {"QwenImagePipeline": " "}


def _library() -> Any:  # noqa: ANN401 - a module without types
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    return diffusers


@dataclass(slots=True)
class DiffusersSide:
    """A pipeline of diffusers."""

    pipeline: Any
    how: str
    engine: str
    device: str
    size: tuple[int, int]
    warnings: tuple[str, ...] = ()
    _schedulers: dict[tuple[str | None, str | None], Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> Any:  # noqa: ANN401 - any of the library's models
        """The module that is called at every step."""
        return getattr(self.pipeline, "transformer", None) or self.pipeline.unet

    def draw(
        self,
        request: PictureRequest,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> Pictures:
        """Pictures (B, H, W, 3) in [0, 1], from noise of torch's CPU generator.

        Raises:
            UsageError: a field the library's pipeline has no argument for.
        """
        refuse_unserved("diffusers", request, _SERVED)
        refuse_weights("diffusers", request, "plain")
        pipeline = self.pipeline
        pipeline.scheduler = self._scheduler(request.sampler, request.schedule)
        taken = signatures.signature(pipeline.__call__).parameters
        prompts = [request.prompt] if isinstance(request.prompt, str) else list(request.prompt)
        arguments: dict[str, Any] = {
            "num_inference_steps": request.steps,
            "width": request.width,
            "height": request.height,
            "num_images_per_prompt": request.batch,
            "generator": _generators(request.seeds),
            "output_type": "np",
            **_guidance(request, taken, pipeline),
        }
        negative = request.negative
        if negative is None and (request.cfg is None or request.cfg > 1):
            negative = _NOTHING.get(type(pipeline).__name__)
        optional = {
            "negative_prompt": negative,
            "clip_skip": None if request.clip_skip in (None, 1) else request.clip_skip - 1,
            "max_sequence_length": request.text_tokens,
        }
        for name, value in optional.items():
            if value is None:
                continue
            if name not in taken:
                raise UsageError(f"{type(pipeline).__name__} of diffusers takes no {name}")
            arguments[name] = [value] * len(prompts) if name == "negative_prompt" else value
        if (on_step or on_latents) is not None and "callback_on_step_end" in taken:
            arguments["callback_on_step_end"] = _stepping(on_step, on_latents, request.steps)
        found = pipeline(prompts, **arguments).images
        pictures: Pictures = np.clip(np.asarray(found, dtype=np.float32), 0, 1)
        return pictures

    def _scheduler(self, sampler: str | None, schedule: str | None) -> Any:  # noqa: ANN401
        """The checkpoint's own scheduler, or the one that stands for a name of ours."""
        key = (sampler, schedule)
        if (None, None) not in self._schedulers:
            self._schedulers[None, None] = self.pipeline.scheduler
        own = self._schedulers[None, None]
        if key in self._schedulers:
            return self._schedulers[key]
        flow = "FlowMatch" in type(own).__name__
        kind = type(own)
        if sampler is not None:
            rows = [SAMPLERS.get(sampler), SAMPLERS.get(f"flow_{sampler}")]
            names = [name for row in rows if row and row.flow == flow for name in row.classes]
            if not names:
                raise UsageError(f"diffusers has no scheduler for sampler {sampler!r} here")
            kind = getattr(_library(), names[0])
        extra = {}
        if schedule is not None:
            if schedule not in _SCHEDULES:
                known = ", ".join(_SCHEDULES)
                raise UsageError(f"diffusers knows no schedule {schedule!r} (it has: {known})")
            extra = dict(_SCHEDULES[schedule])
        self._schedulers[key] = kind.from_config(own.config, **extra)
        return self._schedulers[key]

    @contextlib.contextmanager
    def damaged(self, *, rows: bool) -> Iterator[str | None]:
        """Shuffle rows of one block; scales are out of reach here."""
        with shuffled_rows(self.denoiser) as said:
            yield said

    @contextlib.contextmanager
    def rough(self) -> Iterator[Self | None]:
        """Run the denoiser in bfloat16 by torch's autocast."""
        denoiser = self.denoiser
        own = denoiser.forward
        kind = torch.device(self.device).type

        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the library calls it
            with torch.autocast(kind, dtype=torch.bfloat16):
                out = own(*args, **kwargs)
            if isinstance(out, tuple):
                return tuple(one.float() for one in out)
            out.sample = out.sample.float()
            return out

        denoiser.forward = forward
        try:
            yield self
        finally:
            del denoiser.forward


def _generators(seeds: tuple[int, ...]) -> list[torch.Generator]:
    """One per picture, as the bundled runtime has them."""
    return [torch.Generator("cpu").manual_seed(one) for one in seeds]


def _guidance(
    request: PictureRequest,
    taken: Mapping[str, object],
    pipeline: Any,  # noqa: ANN401 - the library's
) -> dict[str, Any]:
    """Both kinds of guidance under the pipeline's names.

    Pipelines with `true_cfg_scale` mean distilled guidance by `guidance_scale`; the others mean
    classifier-free guidance, and have no distilled one; but a latent consistency model's UNet takes
    `guidance_scale` through its own input, and is then not guided otherwise.
    """
    if "true_cfg_scale" in taken:
        named = {"true_cfg_scale": request.cfg, "guidance_scale": request.guidance}
    elif _guided_inside(pipeline):
        if request.cfg is not None and request.cfg > 1:
            raise UsageError("diffusers runs latent consistency models with guidance, not with cfg")
        named = {"guidance_scale": LCM_GUIDANCE if request.guidance is None else request.guidance}
    else:
        if request.guidance is not None:
            raise UsageError("this pipeline of diffusers takes no distilled guidance; use cfg")
        cfg = request.cfg
        if cfg is not None and type(pipeline).__name__ in _COUNTED_FROM_ZERO:
            cfg = max(cfg - 1, 0.0)
        named = {"guidance_scale": cfg}
    return {name: value for name, value in named.items() if value is not None}


def _guided_inside(pipeline: Any) -> bool:  # noqa: ANN401 - the library's
    unet = getattr(pipeline, "unet", None)
    return unet is not None and unet.config.get("time_cond_proj_dim") is not None


def _stepping(on_step: OnStep | None, on_latents: OnLatents | None, steps: int) -> Any:  # noqa: ANN401 - the library's callback
    def told(_pipeline: object, index: int, _t: object, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(index + 1, steps)
        if on_latents is not None and "latents" in values:
            on_latents(values["latents"].detach().float().cpu().numpy())
        return values

    return told


def open_side(files: EngineFiles) -> DiffusersSide:
    """Open a model in diffusers.

    Raises:
        UsageError: no Diffusers folder that configs and tokenizers could come from, or a vae file.
        ArchitectureError: diffusers has no part for what the file holds.
    """
    refuse_swapped("diffusers", files)
    if files.vae is not None:
        raise UsageError("--engine diffusers takes no --vae; put the VAE into the --base folder")
    library = _library()
    dtype = getattr(torch, files.dtype)
    host = _host(files)
    with opened(files.model) as (_, logical, match):
        route = route_of(files.model, host, logical, match)
        match route.way:
            case "folder":
                pipeline = read_folder(library, files.model, dtype)
                how = "read and run by diffusers"
            case "whole":
                pipeline = read_whole(library, files.model, host, dtype)
                how = f"read and run by diffusers, configs from {host.name}"
            case "denoiser":
                folder = folder_of(match.parts[0])
                given = read_denoiser(library, files.model, host, folder, dtype)
                pipeline = read_folder(library, host, dtype, **{folder: given})
                how = f"{folder} read and run by diffusers, other parts from {host.name}"
            case "decoded":
                pipeline = read_folder(library, _unpacked(files), dtype)
                for part in match.parts:
                    fill(_part_of(pipeline, part), logical, part)
                how = f"decoded by diffquant, run by diffusers: {route.reason}"
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(files.device)
    _attach(pipeline, files.loras)
    engine = f"diffusers {library.__version__}"
    return DiffusersSide(pipeline, how, engine, files.device, _native_size(pipeline, match))


def _native_size(pipeline: Any, match: Match) -> tuple[int, int]:  # noqa: ANN401
    """What its configs say, in latents or pixels; else the family's default."""
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    for module, factor in ((denoiser, pipeline.vae_scale_factor), (pipeline.vae, 1)):
        size = module.config.get("sample_size")
        if isinstance(size, int) and 0 < size * factor <= _LARGEST:
            return size * factor, size * factor
    sampling = ARCHITECTURES[match.architecture].sampling_for(match.variant)
    return sampling.width, sampling.height


def _attach(pipeline: Any, loras: tuple[tuple[Path, float], ...]) -> None:  # noqa: ANN401
    """Load LoRAs as the library's users do, and set their weights."""
    names = [f"lora{index}" for index in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(str(path), adapter_name=name)
    if names:
        pipeline.set_adapters(names, [weight for _, weight in loras])


def _host(files: EngineFiles) -> Path:
    """The Diffusers folder that says which pipeline it is."""
    for path in (files.model, files.base):
        if path is not None and (path / "model_index.json").is_file():
            return path
    raise UsageError(
        f"{files.model}: diffusers needs configs and tokenizers, which a single file lacks: give a "
        "Diffusers folder of the same family with --base"
    )


def _unpacked(files: EngineFiles) -> Path:
    """The folder whose modules take decoded weights."""
    if files.base is not None and (files.base / "model_index.json").is_file():
        return files.base
    raise UsageError(
        f"{files.model}: diffusers cannot read it here; give its unpacked Diffusers folder with "
        "--base, and diffquant decodes the weights for it"
    )


def _part_of(pipeline: Any, part: PartMatch) -> Any:  # noqa: ANN401 - a module of the library
    module = getattr(pipeline, folder_of(part), None)
    if module is None:
        raise ArchitectureError(f"{type(pipeline).__name__} has no {folder_of(part)}")
    return module
