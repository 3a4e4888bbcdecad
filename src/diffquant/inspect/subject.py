"""Subject: one opened file as every report of this room meets it, recognised once.

Reports (describe, LoRA, loaders, fit, health) are functions of a Subject: what was opened, its
logical tensors, what they were recognised as. Only markers of at most 4 KiB have been read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.generic import GENERIC
from diffquant.convert.binding import bind
from diffquant.convert.controls import detect_control
from diffquant.convert.detect import detect_part, kind_of
from diffquant.convert.kinds import is_lora
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import Match
from diffquant.convert.recognise import recognise
from diffquant.convert.strangers import stranger
from diffquant.core.errors import ArchitectureError, UnknownArchitecture
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.io import open_source

__all__ = ["Subject", "open_subject", "subject_of"]

_PART_KINDS = {"vae": "vae", "image_encoder": "clip_vision"}


@dataclass(frozen=True, slots=True)
class Subject:
    """An opened file and what it was recognised as.

    Attributes:
        path: as the user gave it.
        source: physical tensors.
        logical: weights with their companions folded in.
        specs: the logical specs.
        kind: checkpoint, diffusion_model, lora, vae, text_encoder, clip_vision (an encoder of
            images), textual_inversion, controlnet or unknown.
        match: what it is, None where nothing here knows it.
        candidates: for unknown files, the nearest architectures and the keys they miss.
    """

    path: str
    source: TensorSource
    logical: LogicalSource
    specs: Mapping[str, TensorSpec]
    kind: str
    match: Match | None
    candidates: Mapping[str, tuple[str, ...]]


@contextmanager
def open_subject(path: str | Path) -> Iterator[Subject]:
    """Open and recognise a file or folder; it is closed when the context ends.

    Raises:
        CheckpointError: it cannot be read.
    """
    with open_source(path) as source:
        yield subject_of(source, str(path))


def subject_of(source: TensorSource, path: str = "") -> Subject:
    """Recognise an opened source."""
    logical = bind(source)
    specs = logical.specs()
    adapter = is_lora(specs)
    match, candidates = (
        (None, {}) if adapter else _recognise(specs, source.metadata, source.configs)
    )
    return Subject(
        path=path or str(source.path),
        source=source,
        logical=logical,
        specs=specs,
        kind="lora" if adapter else _kind(specs, match),
        match=match,
        candidates=candidates,
    )


def _kind(specs: Mapping[str, TensorSpec], match: Match | None) -> str:
    if match is None:
        shapes = {key: spec.shape for key, spec in specs.items()}
        return "unknown" if stranger(shapes) else kind_of(specs)
    if match.architecture == GENERIC.slug:
        return kind_of(specs)
    if match.parts[0].name == "controlnet":
        return "controlnet"
    if match.architecture in ARCHITECTURES:
        return "checkpoint" if len(match.parts) > 1 else "diffusion_model"
    return _PART_KINDS.get(match.parts[0].name, "text_encoder")


def _recognise(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, Any], configs: Mapping[str, Any]
) -> tuple[Match | None, dict[str, tuple[str, ...]]]:
    try:
        return recognise(specs, metadata, configs), {}
    except UnknownArchitecture as error:
        part = detect_part(specs, metadata, configs) or detect_control(specs)
        return part, {} if part else dict(error.candidates)
    except ArchitectureError:
        return None, {}
