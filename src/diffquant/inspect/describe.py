"""describe(): a file's facts as frozen data, from its header and tensors of at most 4 KiB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffquant.convert.architectures.parts import find_architecture
from diffquant.convert.generic import structure
from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.convert.match import Match
from diffquant.convert.strangers import packing, stranger
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.encodings import Encoding, encoding_warnings, encodings
from diffquant.inspect.inversion import InversionReport, describe_inversion
from diffquant.inspect.loaders import LoaderVerdict, loader_report, matrix_report
from diffquant.inspect.lora import LoraReport, describe_lora
from diffquant.inspect.subject import Subject, subject_of
from diffquant.io import open_source
from diffquant.io.imatrix import (
    ImportanceMatrix,
    is_gguf_imatrix,
    is_legacy_imatrix,
    read_gguf,
    read_imatrix,
)
from diffquant.io.locations import is_remote, locate

__all__ = ["FileReport", "PartReport", "StorageCount", "describe", "describe_subject"]

_METADATA_LIMIT = 200  # characters of a metadata value worth printing


@dataclass(frozen=True, slots=True)
class StorageCount:
    """Tensors and bytes stored as one dtype."""

    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PartReport:
    """One part of a checkpoint. `formats` maps what weights are stored as to how many weights."""

    name: str
    tensors: int
    parameters: int
    nbytes: int
    kind: str
    layout: str
    formats: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class FileReport:
    """What `diffquant inspect` says about one file.

    Attributes:
        title: the architecture's or part's name for people, "" where it is unknown.
        kind: checkpoint, diffusion_model, lora, vae, text_encoder, textual_inversion, controlnet,
            imatrix or unknown.
        architecture: slug, or "unknown"; of LoRAs and textual inversions, the base model's.
        layout: "single" or "diffusers"; of LoRAs, whose names they have.
        nbytes: bytes of all tensors.
        storage: dtype on disk -> count.
        evidence: what recognition rests on, and what the header cannot tell.
        candidates: for unknown files, the nearest architectures and the keys they miss.
        encodings: packed weights, grouped by how they are stored.
        loaders: what each program that reads such files would do with this one, where asked for.
        lora: for LoRAs and other adapters.
        inversion: for textual inversions.
    """

    path: str
    container: str
    kind: str
    architecture: str
    variant: str
    layout: str
    tensors: int
    parameters: int
    nbytes: int
    storage: Mapping[str, StorageCount]
    parts: tuple[PartReport, ...]
    evidence: tuple[str, ...]
    leftovers: Mapping[str, str]
    candidates: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, str]
    warnings: tuple[str, ...]
    encodings: tuple[Encoding, ...] = ()
    title: str = ""
    loaders: tuple[LoaderVerdict, ...] = ()
    lora: LoraReport | None = None
    inversion: InversionReport | None = None


def describe(path: str | Path, *, deep: bool = False, judged: bool = True) -> FileReport:
    """Describe a file or folder from its header.

    Args:
        path: local or remote.
        deep: read the values of adapters too.
        judged: say which programs can load it.

    Raises:
        CheckpointError: it cannot be read.
    """
    name, path = str(path), locate(path)
    if not is_remote(path) and path.is_file() and is_legacy_imatrix(path):
        return _describe_matrix(name, read_imatrix(path))
    with open_source(path) as source:
        if source.container == "gguf" and is_gguf_imatrix(source):
            return _describe_matrix(name, read_gguf(source))
        return describe_subject(subject_of(source, name), deep=deep, judged=judged)


def describe_subject(subject: Subject, *, deep: bool = False, judged: bool = True) -> FileReport:
    """Describe an opened file; see `describe`."""
    report = _describe_file(subject)
    if judged:
        report = replace(report, loaders=loader_report(subject))
    if subject.kind == "lora" and (lora := describe_lora(subject, deep=deep)) is not None:
        return replace(
            report,
            architecture=lora.base,
            variant=lora.variant,
            layout=lora.naming,
            evidence=lora.evidence,
            candidates=lora.candidates,
            warnings=(*report.warnings, *lora.warnings),
            lora=lora,
        )
    if subject.kind == "textual_inversion":
        found = describe_inversion(subject)
        return replace(
            report,
            architecture=found.base,
            evidence=found.evidence,
            candidates={},
            warnings=(*report.warnings, *found.warnings),
            inversion=found,
        )
    return report


def _describe_file(subject: Subject) -> FileReport:
    source, logical, match = subject.source, subject.logical, subject.match
    stored: dict[str, list[int]] = {}
    for spec in source.specs.values():
        stored.setdefault(spec.dtype, []).append(spec.nbytes)
    known = find_architecture(match.architecture) if match else None
    storage = {dtype: StorageCount(len(sizes), sum(sizes)) for dtype, sizes in stored.items()}
    return FileReport(
        path=subject.path,
        container=source.container,
        kind=subject.kind,
        architecture=match.architecture if match else "unknown",
        variant=match.variant if match else "",
        layout=match.layout if match else "",
        tensors=len(source.specs),
        parameters=sum(tensor.size for tensor in logical.tensors.values()),
        nbytes=sum(one.nbytes for one in storage.values()),
        storage=storage,
        parts=_parts(logical, match),
        evidence=tuple(match.evidence) if match else _unknown(subject.kind, subject.specs),
        leftovers=dict(match.leftovers) if match else {},
        candidates=subject.candidates,
        metadata=_metadata(source.metadata),
        warnings=(
            *logical.warnings,
            *encoding_warnings(logical),
            *(match.warnings if match else ()),
        ),
        encodings=encodings(logical, match),
        title=known.title if known else "",
    )


def _describe_matrix(path: str, matrix: ImportanceMatrix) -> FileReport:
    """Describe an importance matrix: it has no architecture, and its tensors are no weights."""
    values = sum(entry.sums.size for entry in matrix.entries.values())
    measured = f"{len(matrix.entries)} weights measured in {matrix.chunk_count} chunks"
    if matrix.datasets:
        measured += f" on {', '.join(matrix.datasets)}"
    nbytes = sum(4 * (one.sums.size + one.counts.size) for one in matrix.entries.values())
    return FileReport(
        path=path,
        container="dat" if matrix.legacy else "gguf",
        kind="imatrix",
        architecture="unknown",
        variant="",
        layout="",
        tensors=len(matrix.entries),
        parameters=values,
        nbytes=nbytes,
        storage={"F32": StorageCount(len(matrix.entries), nbytes)},
        parts=(),
        evidence=(measured,),
        leftovers={},
        candidates={},
        metadata={
            "entries": str(len(matrix.entries)),
            "chunks": str(matrix.chunk_count),
            "datasets": ", ".join(matrix.datasets),
        },
        warnings=(),
        loaders=matrix_report(),
    )


def _unknown(kind: str, specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """What can be said of a model nobody here knows."""
    if kind not in ("diffusion_model", "unknown"):
        return ()
    shapes = {key: spec.shape for key, spec in specs.items()}
    if told := stranger(shapes) or packing(shapes):
        return (told,)
    found = structure(shapes)
    return (*found, "quantize --arch generic packs its blocks") if found else ()


def _parts(logical: LogicalSource, match: Match | None) -> tuple[PartReport, ...]:
    if match is None:
        return ()
    found = []
    for part in match.parts:
        tensors = [logical.tensors[part.prefix + key] for key in part.shapes]
        formats: dict[str, int] = {}
        parameters = nbytes = 0
        for tensor in tensors:
            name = tensor.format or tensor.foreign or tensor.dtype.lower()
            size = tensor.size
            formats[name] = formats.get(name, 0) + size
            parameters += size
            nbytes += _stored_nbytes(logical, tensor)
        found.append(
            PartReport(
                name=part.name,
                tensors=len(tensors),
                parameters=parameters,
                nbytes=nbytes,
                kind=part.kind,
                layout=part.layout,
                formats=formats,
            )
        )
    return tuple(found)


def _stored_nbytes(logical: LogicalSource, tensor: LogicalTensor) -> int:
    specs = logical.source.specs
    if len(tensor.parts) == 1:
        return specs[tensor.key].nbytes
    return sum(specs[key].nbytes for key in {tensor.key, *tensor.parts.values()})


def _metadata(metadata: Mapping[str, Any]) -> dict[str, str]:
    out = {}
    for key in metadata:
        value = metadata[key]
        if isinstance(value, str | int | float | bool):
            text = str(value)
            out[key] = text if len(text) <= _METADATA_LIMIT else f"{len(text)} characters"
        else:
            out[key] = f"{len(value)} values" if hasattr(value, "__len__") else type(value).__name__
    return out
