"""A release: which files are published, under which names, and everything the card says of them.

Made from what lies here; nothing is written and no network is used, but for the license lookup that
the caller may hand in. Two files never get one name, and no name leaves its folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.core.errors import MalformedFile, UsageError, shorten
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.io import open_source
from diffquant.io.imatrix import is_gguf_imatrix
from diffquant.publish.comfy_folders import COMFY_FOLDERS
from diffquant.publish.facts import FileFacts, facts_of
from diffquant.publish.licences import License, check_license, license_of
from diffquant.publish.measured import Measured, read_comparison
from diffquant.publish.names import PublishedName, base_name, published_name
from diffquant.publish.samples import Sample, read_samples
from diffquant.publish.selection import local_name

__all__ = ["LAYOUTS", "Published", "Release", "ReleaseRequest", "make_release", "published_files"]

LAYOUTS = ("flat", "comfy")
_WEIGHTS = (".gguf", ".safetensors")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.", re.ASCII)
_STEM = re.compile(r"[A-Za-z0-9][\w.+-]{0,120}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    """What is published, and what only the publisher knows.

    Attributes:
        paths: files, a folder of files, or one Diffusers folder.
        title: heading of the card, "" for the base model's or the first file's name.
        base_models: repositories that the files were made from.
        license: asked for; None inherits.
        base_card: README of the original, for its license.
        quantized_by: who made the files, "" to leave it out.
        comparison: JSON of `diffquant compare --json`.
        samples: pictures, or folders of them.
        grid: a picture shown large.
        layout: one of LAYOUTS.
        stem: what file names begin with, "" for their own.
        language: of prompts, as the Hub's codes.
    """

    paths: tuple[Path, ...]
    title: str = ""
    base_models: tuple[str, ...] = ()
    license: License | None = None
    base_card: Path | None = None
    quantized_by: str = ""
    comparison: Path | None = None
    samples: tuple[Path, ...] = ()
    grid: Path | None = None
    layout: str = "flat"
    stem: str = ""
    language: tuple[str, ...] = ("en",)


@dataclass(frozen=True, slots=True)
class Published:
    """A file and its place in the repository."""

    facts: FileFacts
    name: PublishedName
    folder: str = ""

    @property
    def place(self) -> str:
        """Path in the repository."""
        return f"{self.folder}/{self.name.name}" if self.folder else self.name.name


@dataclass(frozen=True, slots=True)
class Release:
    """Everything that is published but the card's text.

    Attributes:
        files: largest first.
        notes: names that were changed, files that were left out.
    """

    request: ReleaseRequest
    title: str
    files: tuple[Published, ...]
    license: License
    base_models: tuple[str, ...]
    measured: Measured | None
    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


def make_release(
    request: ReleaseRequest,
    *,
    lookup: Callable[[str], Mapping[str, Any]] | None = None,
    progress: Progress = NO_PROGRESS,
) -> Release:
    """Bring a release together; every published file is read once, for its hash.

    Args:
        request: what is published.
        lookup: repository -> front matter of its card on the Hub; None uses no network.
        progress: told about bytes that are hashed.

    Raises:
        UsageError: nothing to publish, two files of one name, no license, or a bad value.
        CheckpointError: a file that cannot be read.
    """
    _check(request)
    paths, notes = published_files(request.paths)
    facts = sorted(facts_of(paths, progress=progress), key=lambda one: (-one.nbytes, one.path.name))
    files = tuple(_placed(one, request) for one in facts)
    _refuse_twice(files)
    notes += [one.name.note for one in files if one.name.note]
    bases = request.base_models or _stated_bases(facts)
    if not bases:
        notes.append(
            "no base model is named, so the Hub links no original: give --base-model OWNER/NAME"
        )
    beside = dict.fromkeys(path.parent / "README.md" for path in paths)
    licence = license_of(
        facts,
        asked=request.license,
        cards=[*([request.base_card] if request.base_card else []), *beside],
        base_models=bases,
        lookup=lookup,
    )
    return Release(
        request=request,
        title=request.title or _title(bases, files),
        files=files,
        license=licence,
        base_models=bases,
        measured=read_comparison(request.comparison, paths) if request.comparison else None,
        samples=read_samples(request.samples, request.grid),
        notes=tuple(notes),
    )


def _check(request: ReleaseRequest) -> None:
    if request.layout not in LAYOUTS:
        raise UsageError(f"--layout {request.layout}: expected one of {', '.join(LAYOUTS)}")
    for repo in request.base_models:
        if not _REPO.fullmatch(repo):
            raise UsageError(f"--base-model {repo!r:.120}: expected owner/name, as on the Hub")
    if request.license is not None:
        check_license(request.license)  # before anything is hashed
    if request.stem and not _STEM.fullmatch(request.stem):
        raise UsageError(
            f"--name {request.stem!r:.120}: expected letters, digits, and . _ + - between them"
        )
    if request.base_card is not None and not request.base_card.is_file():
        raise UsageError(f"--base-card {request.base_card}: no such file")


def published_files(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Files to publish, and what was left out.

    Raises:
        UsageError: nothing that can be published, or what this command does not take.
    """
    found: list[Path] = []
    notes: list[str] = []
    named = {path.resolve() for path in paths}
    for path in paths:
        if (path / "model_index.json").is_file():
            raise UsageError(
                f"{path}: a Diffusers folder is uploaded as it is: `hf upload OWNER/NAME {path}`; "
                "publish takes single files (.gguf, .safetensors)"
            )
        if path.is_dir():
            inside = sorted(one for one in path.iterdir() if one.suffix.lower() in _WEIGHTS)
            hidden = [one for one in inside if one.name.startswith(".") or not one.is_file()]
            found += [one for one in inside if one not in hidden]
            notes += _left_out(path, named)
        elif path.suffix.lower() not in _WEIGHTS:
            raise UsageError(f"{path}: expected .gguf or .safetensors files, or a folder of them")
        elif not path.is_file():
            raise UsageError(f"{path}: no such file")
        else:
            found.append(path)
    found = list(dict.fromkeys(found))
    shards = [one.name for one in found if _SHARD.search(one.name)]
    if shards:
        raise UsageError(
            f"{shorten(shards, 2)}: shards of a checkpoint, which loaders of single files "
            "do not read; `diffquant convert` it to one file"
        )
    matrices = [one for one in found if _is_imatrix(one)]
    notes += [f"{one.name} is left out: an importance matrix, no model" for one in matrices]
    found = [one for one in found if one not in matrices]
    if not found:
        raise UsageError(
            "; ".join(
                (f"no .gguf or .safetensors file to publish in {shorten(map(str, paths))}", *notes)
            )
        )
    return found, notes


def _left_out(folder: Path, named: Container[Path]) -> Iterator[str]:
    """What a folder has besides files that are published: one sentence for each."""
    for one in sorted(folder.iterdir()):
        name = one.name
        if one.name.startswith(".diffquant-") or one.name.startswith("._"):
            continue  # our own records, and what macOS leaves
        if one.suffix.lower() in _PICKLES and one.is_file():
            yield f"{name} is left out: no .gguf or .safetensors; `diffquant convert` it"
        if one.suffix.lower() in _WEIGHTS and one.name.startswith("."):
            yield f"{name} is left out: its name begins with a dot"
        if not one.is_dir() or one.resolve() in named:
            continue
        if (one / "model_index.json").is_file():
            yield f"{name}/ is left out: a Diffusers folder; `hf upload` takes it as it is"
        elif count := sum(path.suffix.lower() in _WEIGHTS for path in _walk(one)):
            files = "a file" if count == 1 else f"{count} files"
            yield (
                f"{name}/ is left out: {files} of weights in it; folders in a folder are not "
                "published unless they are named too"
            )


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder; links to folders are not followed."""
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)


def _is_imatrix(path: Path) -> bool:
    if path.suffix.lower() != ".gguf":
        return False
    with open_source(path) as source:
        return is_gguf_imatrix(source)


def _placed(facts: FileFacts, request: ReleaseRequest) -> Published:
    name = published_name(
        facts.path,
        kind=facts.type,
        largest=facts.largest,
        container=facts.report.container,
        stem=request.stem,
        claimed=facts.claimed,
    )
    try:
        local_name(name.name)
    except MalformedFile:  # told of downloads
        raise UsageError(
            f"{name.name!r:.200} is no file name that every system can store; rename the file, or "
            "give --name STEM"
        ) from None
    folder = COMFY_FOLDERS.get(facts.report.kind, "") if request.layout == "comfy" else ""
    return Published(facts, name, folder)


def _refuse_twice(files: Sequence[Published]) -> None:
    taken: dict[str, Path] = {}
    for one in files:
        other = taken.setdefault(one.place.lower(), one.facts.path)
        if other != one.facts.path:
            raise UsageError(
                f"{other} and {one.facts.path} would both be published as {one.place}; publish one "
                "of them, or rename one"
            )


def _stated_bases(facts: Sequence[FileFacts]) -> tuple[str, ...]:
    """Repositories that GGUF headers name as the base (gguf-py constants.py, Keys.General)."""
    found = []
    for one in facts:
        for key in ("general.base_model.0.repo_url", "general.source.repo_url"):
            told = one.header.get(key, "").removeprefix("https://huggingface.co/").strip("/")
            if _REPO.fullmatch(told):
                found.append(told)
                break
    return tuple(dict.fromkeys(found))


def _title(bases: Sequence[str], files: Sequence[Published]) -> str:
    if bases:
        name = bases[0].partition("/")[2]
    else:
        name = base_name(files[0].facts.mark("source.name")) or files[0].facts.path.stem
        name = re.sub(r"\.(safetensors|gguf|ckpt|pt|bin)$", "", name)
    containers = {one.facts.report.container for one in files}
    return f"{name} {'GGUF' if containers == {'gguf'} else 'quantized'}"
