"""What is embedded in a picture: everything that decided it, under the names of the options.

Files are told by name and hash, never by path: a model by its fingerprint (specs and samples of its
weights; a checkpoint of many GB is not read for it), other files by their sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffquant import __version__
from diffquant.convert.output import fingerprint
from diffquant.io import open_source
from diffquant.runtime.parameters import VERSION
from diffquant.runtime.request import PictureRequest

__all__ = ["Files", "facts_of", "hash_of_file", "hash_of_model"]

_PLAIN = (
    "negative", "steps", "cfg_cutoff", "cfg_rescale", "guidance", "shift", "eta", "text_tokens",
    "clip_skip", "prompt_style", "rng",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Files:
    """Names and hashes.

    Attributes:
        model: (name, fingerprint).
        parts: part -> the same, of those that were added.
        loras: (name, weight, sha256).
        images: "image" or "mask" -> (name, sha256).
        models: "refiner" or "hires_model" -> (name, fingerprint).
    """

    model: tuple[str, str]
    parts: Mapping[str, tuple[str, str]]
    loras: tuple[tuple[str, float, str], ...]
    images: Mapping[str, tuple[str, str]]
    models: Mapping[str, tuple[str, str]]


def hash_of_model(path: Path) -> str:
    """Fingerprint of a model."""
    with open_source(path) as source:
        return fingerprint(source)


def hash_of_file(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def facts_of(
    request: PictureRequest,
    settings: Mapping[str, Any],
    files: Files,
    *,
    sampler: str,
    cfg: float,
    dtype: str,
    preset: str,
    compute: str = "exact",
) -> dict[str, Any]:
    """The facts that pictures of one run share; `seed` is each picture's own.

    Args:
        request: as it ran.
        settings: options, for what the request does not hold.
        files: names and hashes.
        sampler: as it was used.
        cfg: likewise.
        dtype: of the computation.
        preset: name of what was chosen, "none" for none.
        compute: what the denoiser was asked to multiply in.
    """
    facts: dict[str, Any] = {key: getattr(request, key) for key in _PLAIN}
    facts |= {
        "version": VERSION,
        "prompt": request.prompt if isinstance(request.prompt, str) else request.prompt[0],
        "size": [request.width, request.height],
        "cfg": cfg,
        "sampler": sampler,
        "schedule": request.schedule if isinstance(request.schedule, str) else None,
        "preset": preset,
        "dtype": dtype,
        "model": files.model[0],
        "fingerprint": files.model[1],
        "parts": {
            name: {"name": one, "hash": digest} for name, (one, digest) in files.parts.items()
        },
        "loras": [
            {"name": name, "weight": weight, "hash": digest} for name, weight, digest in files.loras
        ],
        "versions": {"diffquant": __version__, "torch": torch.__version__},
    }
    if compute != "exact":
        facts["compute"] = compute
    for name, (one, digest) in files.images.items():
        facts[name] = {"name": one, "hash": digest}
        facts["strength"] = request.strength
    if "refiner" in files.models:
        name, digest = files.models["refiner"]
        switch = settings["refiner_switch"]
        facts["refiner"] = {"name": name, "hash": digest, "switch": switch}
    if "hires" in settings:
        name, digest = files.models.get("hires_model", ("", ""))
        facts["hires"] = {
            "factor": settings["hires"],
            "strength": settings["hires_strength"],
            "name": name,
            "hash": digest,
        }
    return facts
