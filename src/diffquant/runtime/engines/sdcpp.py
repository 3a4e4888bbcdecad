"""stable-diffusion.cpp as an engine, through cyllama, a package that carries it.

The candidate's file is given to the program as it is, once the program has a name for it: a
checkpoint as the model, a denoiser alone as the diffusion model. Parts it lacks are written by our
converter into files of their own, from the base; so is the denoiser of a Diffusers folder, which
the program does not read, and `how` says so. Noise is drawn as torch's CPU generator draws it
(the program's `cpu` generator), so a seed means the same here and in the bundled runtime.
Source: leejet/stable-diffusion.cpp@97d2990:examples/cli/README.md.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.jobs import opened, run_job
from diffquant.convert.match import Match
from diffquant.convert.plan import Request
from diffquant.core.errors import UsageError, VerificationError
from diffquant.runtime.engines.base import (
    EngineFiles,
    OnLatents,
    OnStep,
    Pictures,
    refuse_swapped,
    refuse_unserved,
    refuse_weights,
)
from diffquant.runtime.families import FAMILIES
from diffquant.runtime.request import PictureRequest

__all__ = ["SdcppSide", "open_side"]

_SERVED = frozenset(
    {"negative", "seed", "batch", "steps", "cfg", "width", "height", "sampler", "schedule"}
    | {"clip_skip", "shift", "eta", "prompt_style"}
)
# What a part's file is passed as, by the kind of part.
_OPTIONS: Mapping[str, str] = {
    "clip_text": "clip_l_path",
    "openclip_text": "clip_g_path",
    "t5_encoder": "t5xxl_path",
    "qwen2_vl_text": "llm_path",
    "qwen3_text": "llm_path",
    "mistral_text": "llm_path",
    "vae_kl": "vae_path",
    "vae_flux2": "vae_path",
    "vae_qwen": "vae_path",
}
_SAMPLERS = {
    "euler": "EULER",
    "flow_euler": "EULER",
    "euler_a": "EULER_A",
    "heun": "HEUN",
    "dpmpp_2m": "DPMPP2M",
    "lcm": "LCM",
    "tcd": "TCD",
    "ddim": "DDIM_TRAILING",
}
_SCHEDULES = {
    "normal": "DISCRETE",
    "karras": "KARRAS",
    "exponential": "EXPONENTIAL",
    "ays": "AYS",
    "simple": "SIMPLE",
    "sgm_uniform": "SGM_UNIFORM",
}


@dataclass(slots=True, weakref_slot=True)
class SdcppSide:
    """A context of stable-diffusion.cpp."""

    library: Any
    context: Any
    how: str
    engine: str
    size: tuple[int, int]
    warnings: tuple[str, ...] = ()
    _closed: list[object] = field(default_factory=list)

    def draw(
        self,
        request: PictureRequest,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> Pictures:
        """Pictures (B, H, W, 3) in [0, 1], read back from 8 bits; latents are not told.

        Raises:
            UsageError: a field the program has no option for.
            VerificationError: it drew nothing.
        """
        refuse_unserved("sdcpp", request, _SERVED)
        refuse_weights("sdcpp", request, "a1111")
        if not isinstance(request.prompt, str) or not isinstance(request.seed, int):
            raise UsageError("--engine sdcpp draws one prompt and one seed at a time")
        optional = {
            "sample_method": _named(self.library.SampleMethod, _SAMPLERS, request.sampler),
            "scheduler": _named(self.library.Scheduler, _SCHEDULES, request.schedule),
            "cfg_scale": request.cfg,
            "clip_skip": request.clip_skip,
            "flow_shift": request.shift,
            "eta": request.eta,
        }
        images = self.context.generate(
            request.prompt,
            negative_prompt=request.negative or "",
            width=request.width,
            height=request.height,
            seed=request.seed,
            batch_count=request.batch,
            sample_steps=request.steps,
            **{name: value for name, value in optional.items() if value is not None},
        )
        if not images:
            raise VerificationError("stable-diffusion.cpp drew nothing")
        if on_step is not None:
            on_step(request.steps, request.steps)
        stacked = np.stack([np.asarray(one.to_numpy()) for one in images])
        pictures: Pictures = stacked.astype(np.float32) / np.float32(255)
        return pictures

    @contextlib.contextmanager
    def damaged(self, *, rows: bool) -> Iterator[str | None]:
        """Nothing: the program's weights cannot be reached."""
        yield None

    @contextlib.contextmanager
    def rough(self) -> Iterator[Self | None]:
        """Nothing: the program computes as it does."""
        yield None


def _named(names: Any, table: Mapping[str, str], name: str | None) -> Any:  # noqa: ANN401
    if name is None:
        return None
    if name not in table:
        raise UsageError(f"stable-diffusion.cpp has no {name!r} (known: {', '.join(table)})")
    return getattr(names, table[name])


def open_side(files: EngineFiles) -> SdcppSide:
    """Open a model in stable-diffusion.cpp.

    Raises:
        UsageError: LoRAs, another device or dtype, or parts that are nowhere to be found.
    """
    refuse_swapped("sdcpp", files)
    if files.loras:
        raise UsageError("--engine sdcpp takes no LoRA here; merge it first: diffquant lora merge")
    if files.device != "cpu":
        raise UsageError(f"--engine sdcpp runs on the CPU here, found --device {files.device}")
    import cyllama.sd as library

    folder = tempfile.TemporaryDirectory(prefix="diffquant-sdcpp-")
    try:
        given, how, match = _given(files, Path(folder.name))
        parameters = library.SDContextParams()
        for name, path in given.items():
            setattr(parameters, name, str(path))
        parameters.n_threads = os.cpu_count() or 1
        parameters.rng_type = library.RngType.CPU
        context = library.SDContext(parameters)
        if not context.is_valid:
            names = ", ".join(f"{key} {path.name}" for key, path in given.items())
            raise VerificationError(f"stable-diffusion.cpp refused the files ({names})")
    except BaseException:
        folder.cleanup()
        raise
    sampling = ARCHITECTURES[match.architecture].sampling_for(match.variant)
    version = importlib.metadata.version("cyllama")
    side = SdcppSide(
        library,
        context,
        how,
        f"stable-diffusion.cpp (cyllama {version})",
        (sampling.width, sampling.height),
    )
    weakref.finalize(side, _close, context, folder)
    return side


def _close(context: Any, folder: tempfile.TemporaryDirectory[str]) -> None:  # noqa: ANN401
    context.close()
    folder.cleanup()


def _given(files: EngineFiles, folder: Path) -> tuple[dict[str, Path], str, Match]:
    """Files for the program: option -> path, and who wrote them."""
    with opened(files.model) as (_, _, match):
        pass
    have = {part.name for part in match.parts}
    if match.architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UsageError(f"--engine sdcpp is known to draw {known}, not {match.architecture}")
    needs = FAMILIES[match.architecture].needs
    whole = files.model.is_file()
    given: dict[str, Path] = {}
    if not whole:
        given["diffusion_model_path"] = _part(files.model, folder, ("denoiser",))
        how = "written as single files by diffquant, run by stable-diffusion.cpp"
        source, rest = files.model, [name for name in needs if name != "denoiser"]
    else:
        given["model_path" if have != {"denoiser"} else "diffusion_model_path"] = files.model
        how = "read and run by stable-diffusion.cpp"
        source, rest = files.base or files.model, [name for name in needs if name not in have]
    if files.vae is not None:
        given["vae_path"] = files.vae
        rest = [name for name in rest if name != "vae"]
    if rest and source == files.model and whole:
        raise UsageError(f"{files.model} has no {', '.join(rest)}: give them with --base")
    if rest and "unet" in ARCHITECTURES[match.architecture].component("denoiser").kind:
        given["model_path"] = _part(source, folder, tuple(rest))  # it wants one file for these
    else:
        for name in rest:
            kind = ARCHITECTURES[match.architecture].component(name).kind
            given[_OPTIONS[kind]] = _part(source, folder, (name,))
    return given, how, match


def _part(source: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """Write some parts of a model into a file of their own."""
    out = folder / f"{'-'.join(names)}.safetensors"
    run_job(source, out, Request("safetensors", parts=names))
    return out
