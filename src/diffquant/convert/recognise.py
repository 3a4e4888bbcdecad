"""recognise(): one Match for a source, however it is to be found.

By names and shapes; with `--arch NAME` that architecture alone; with `--arch generic`, or a header
of ours that says so, any transformer. What the header claims and the tensors deny is a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.generic import GENERIC
from diffquant.convert.architectures.parts import PARTS
from diffquant.convert.controls import detect_control
from diffquant.convert.detect import detect, detect_encoder, detect_part
from diffquant.convert.generic import generic_match
from diffquant.convert.match import Match
from diffquant.core.errors import ArchitectureError, UnknownArchitecture, UnknownFormat
from diffquant.core.tensors import TensorSpec

__all__ = [
    "ARCHITECTURE_NAMES",
    "claims",
    "modelspec_architectures",
    "recognise",
    "recognise_part",
]

ARCHITECTURE_NAMES = (*ARCHITECTURES, GENERIC.slug)

# Beginnings of `modelspec.architecture`, and the architectures they may stand for; the first that
# fits. Source: Stability-AI/ModelSpec README.md and kohya-ss/sd-scripts library/sai_model_spec.py.
_MODELSPEC = (
    ("stable-diffusion-v1", ("sd15",)),
    ("stable-diffusion-v2", ("sd2",)),
    ("stable-diffusion-xl", ("sdxl", "sdxl_refiner", "kolors")),
    ("stable-diffusion-3", ("sd3",)),
    ("flux-1", ("flux1",)),
    ("flux-2", ("flux2",)),
    ("chroma", ("chroma",)),
    ("qwen-image", ("qwen_image",)),
    ("lumina-2", ("lumina2",)),
    ("z-image", ("z_image",)),
    ("hunyuan", ("hunyuan",)),
    ("anima", ("anima",)),
)
_DENOISERS = frozenset(
    name
    for row in ARCHITECTURES.values()
    for name in (row.gguf_architecture, *row.gguf_names.values())
)


def recognise(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, object] | None = None,
    configs: Mapping[str, object] | None = None,
    *,
    arch: str = "",
) -> Match:
    """A model, else a text encoder in a file of its own, else what `arch` says.

    Raises:
        UnknownArchitecture, AmbiguousArchitecture: see `detect`.
        UnknownFormat: no architecture of that name.
    """
    metadata = metadata or {}
    if arch and arch not in ARCHITECTURE_NAMES:
        raise UnknownFormat(arch, ARCHITECTURE_NAMES, what="architecture")
    if arch == GENERIC.slug:
        return generic_match(specs)
    try:
        match = detect(specs, metadata, configs, only=arch)
    except UnknownArchitecture as error:
        if arch:
            raise _another(specs, metadata, configs, arch, error) from None
        encoder = detect_encoder(specs, metadata, configs)
        if encoder is not None:
            return encoder
        if metadata.get("diffquant.architecture") == GENERIC.slug:
            return generic_match(specs)
        raise _other(specs, metadata, configs, error) from None
    told = claims(match, metadata)
    return replace(match, warnings=(*match.warnings, *told)) if told else match


def recognise_part(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, object] | None = None,
    configs: Mapping[str, object] | None = None,
    *,
    arch: str = "",
    quantized: bool = False,
) -> Match:
    """As `recognise`, and an autoencoder in a file of its own too.

    Args:
        specs: as `recognise` takes them, and the next three likewise.
        metadata: see there.
        configs: see there.
        arch: see there.
        quantized: only such autoencoders as have a precision policy: tiny ones.

    Raises:
        ArchitectureError: see `recognise`.
    """
    try:
        return recognise(specs, metadata, configs, arch=arch)
    except UnknownArchitecture as error:
        alone = None if arch else detect_part(specs, metadata, configs)
        if alone is None or (quantized and not PARTS[alone.architecture].keep):
            raise error
        return alone


def _other(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, object],
    configs: Mapping[str, object] | None,
    error: UnknownArchitecture,
) -> UnknownArchitecture:
    """The error of what is recognised and no model: a part alone, or what steers a model."""
    part = detect_part(specs, metadata, configs)
    if part is not None:
        what = f"this is a part of a model, {PARTS[part.architecture].title}, in a file of its own"
    elif (control := detect_control(specs)) is not None:
        what = f"this is {control.evidence[0]}"
    else:
        return error
    return UnknownArchitecture(
        f"{what}: it is recognised, and nothing here converts it (known: "
        f"{', '.join(ARCHITECTURES)})"
    )


def _another(
    specs: Mapping[str, TensorSpec],
    metadata: Mapping[str, object],
    configs: Mapping[str, object] | None,
    arch: str,
    error: UnknownArchitecture,
) -> UnknownArchitecture:
    """The error of tensors that are not those of `arch`: it says whose they are, where it can."""
    try:
        found = detect(specs, metadata, configs)
    except ArchitectureError:
        return error
    return UnknownArchitecture(
        f"--arch {arch}: these tensors are those of {found.architecture}, not of {arch}; leave "
        "--arch out"
    )


def modelspec_architectures(text: str) -> tuple[str, ...]:
    """Architectures that a `modelspec.architecture` may stand for; empty for an unknown one."""
    return next((names for begin, names in _MODELSPEC if text.lower().startswith(begin)), ())


def claims(match: Match, metadata: Mapping[str, object]) -> tuple[str, ...]:
    """What a header says of the architecture that the tensors deny."""
    found = []
    spec = str(metadata.get("modelspec.architecture", ""))
    meant = modelspec_architectures(spec)
    if meant and match.architecture not in meant:
        found.append(("modelspec.architecture", spec))
    general = str(metadata.get("general.architecture", ""))
    row = ARCHITECTURES.get(match.architecture)
    ours = row.gguf_architecture_for(match.variant) if row else general
    if general in _DENOISERS and general != ours:
        found.append(("general.architecture", general))
    return tuple(
        f"{key} says {said:.60}, the tensors are those of {match.architecture}: the tensors are "
        "followed"
        for key, said in found
    )
