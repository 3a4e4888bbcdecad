"""What a card says of each file, from its header: what it is, holds, needs, and who can load it.

Nothing is taken on trust but the header itself. Why a weight is kept in high precision is found by
planning the file's own type on the file again: the plan gives a reason for every tensor, and those
that are stored unpacked keep theirs. Where that cannot be planned, no reason is given.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.convert.plan import Request, make_plan
from diffquant.convert.request import POLICIES
from diffquant.convert.step import Step
from diffquant.core.errors import DiffquantError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.inspect.describe import FileReport, describe_subject
from diffquant.inspect.fit import FitReport, fit
from diffquant.inspect.loaders import LoaderVerdict
from diffquant.inspect.subject import Subject, open_subject
from diffquant.publish.names import type_of_header
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES, type_named

__all__ = ["FileFacts", "Kept", "facts_of", "sha256_of"]

_HIGH = ("f32", "f16", "bf16", "f64")
_WINDOW = 8 << 20


@dataclass(frozen=True, slots=True)
class Kept:
    """Weights of the quantized part that are stored in high precision for one reason."""

    format: str
    reason: str
    tensors: int
    parameters: int


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One file of a release.

    Attributes:
        path: where it lies.
        nbytes: of the file.
        sha256: of the file.
        report: as inspect has it.
        header: every header pair that is text or a number, in full.
        type: TYPES name, "" where nothing says it, or a recipe chose what that type would not.
        claimed: what the header calls it, where it is not that throughout.
        part: the part that was quantized.
        largest: FORMATS name or stored dtype of most of its weights.
        bits_per_weight: of that part, scales included.
        stored: format -> share of the part's weights, largest first.
        kept: what stays in high precision; empty where nothing is quantized.
        fit: what a picture takes at the native size; its `reason` says why nothing is known.
    """

    path: Path
    nbytes: int
    sha256: str
    report: FileReport
    header: Mapping[str, str]
    type: str
    part: str
    largest: str
    bits_per_weight: float
    stored: tuple[tuple[str, float], ...]
    kept: tuple[Kept, ...]
    fit: FitReport
    claimed: str = ""

    @property
    def loaders(self) -> tuple[LoaderVerdict, ...]:
        """Verdict per program."""
        return self.report.loaders

    @property
    def is_quantized(self) -> bool:
        """Whether most of the part is stored in a packed format."""
        return self.largest not in _HIGH

    def mark(self, name: str) -> str:
        """`diffquant.NAME` of the header, "" where it has none."""
        return self.header.get(f"diffquant.{name}", "")


def facts_of(
    paths: Iterable[Path], *, hashed: bool = True, progress: Progress = NO_PROGRESS
) -> tuple[FileFacts, ...]:
    """Read what the card says of each file; every byte once, for its hash, unless not `hashed`.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    paths = tuple(paths)
    found = []
    progress.start("hash", sum(path.stat().st_size for path in paths) if hashed else 0)
    try:
        for path in paths:
            with open_subject(path) as subject:
                digest = sha256_of(path, progress) if hashed else ""
                found.append(_facts(path, subject, digest))
    finally:
        progress.stop()
    return tuple(found)


def sha256_of(path: Path, progress: Progress = NO_PROGRESS) -> str:
    """Hash a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_WINDOW):
            digest.update(chunk)
            progress.advance(len(chunk), path.name)
    return digest.hexdigest()


def _facts(path: Path, subject: Subject, digest: str) -> FileFacts:
    report = describe_subject(subject)
    header = _texts(subject.source.metadata)
    part = next(
        (one for one in report.parts if one.name == "denoiser"),
        max(report.parts, key=lambda one: one.parameters, default=None),
    )
    weights: Mapping[str, int] = part.formats if part is not None else _by_dtype(subject)
    total = sum(weights.values()) or 1
    stored = sorted(((name, count / total) for name, count in weights.items()), key=lambda x: -x[1])
    largest = stored[0][0] if stored else ""
    named = type_of_header(header, largest)
    steps = _planned(subject, report, header, named)
    by_recipe = header.get("diffquant.policy") == "recipe"
    kind = "" if by_recipe and not _is_all(subject, steps) else named
    nbytes, parameters = (
        (part.nbytes, part.parameters) if part is not None else (report.nbytes, report.parameters)
    )
    return FileFacts(
        path=path,
        nbytes=path.stat().st_size,
        sha256=digest,
        report=report,
        header=header,
        type=kind,
        part=part.name if part is not None else "",
        largest=largest,
        bits_per_weight=nbytes * 8 / parameters if parameters else 0.0,
        stored=tuple(stored),
        kept=_kept(subject, steps) if kind and largest not in _HIGH else (),
        fit=fit(subject),
        claimed="" if kind else named,
    )


def _texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: str(value) for key, value in metadata.items() if isinstance(value, str | int | float)
    }


def _by_dtype(subject: Subject) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in subject.logical.tensors.values():
        name = tensor.format or tensor.foreign or tensor.dtype.lower()
        found[name] = found.get(name, 0) + tensor.size
    return found


def _planned(
    subject: Subject, report: FileReport, header: Mapping[str, str], kind: str
) -> tuple[Step, ...]:
    """The file's own type planned on it; empty where that cannot be done."""
    if subject.match is None or not kind or report.container not in TYPES[kind].dialects:
        return ()
    policy = header.get("diffquant.policy", "")
    request = Request(
        report.container,
        type=type_named(kind),
        allow_requantize=True,
        target=header.get("diffquant.target", ""),
        policy=policy if policy in POLICIES else POLICIES[0],
    )
    try:
        return make_plan(subject.logical, subject.match, request).steps
    except DiffquantError:  # the card then gives no reasons
        return ()


def _is_all(subject: Subject, steps: Sequence[Step]) -> bool:
    """Whether every packed weight is stored, or would be, as a plan has it."""
    pairs = [(step.stored, _stored(subject, step)) for step in steps if step.part == "denoiser"]
    return bool(pairs) and all(
        planned == found or (planned in _HIGH and found in _HIGH) for planned, found in pairs
    )


def _stored(subject: Subject, step: Step) -> str:
    """What the weight of a step is stored as in the file."""
    first = step.assignment.pieces[0].key if step.assignment.pieces else ""
    tensor = subject.logical.tensors.get(first)
    return (tensor.format or tensor.dtype.lower()) if tensor is not None else step.stored


def _kept(subject: Subject, steps: Sequence[Step]) -> tuple[Kept, ...]:
    """What stays unpacked, and the policy's words for why."""
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for step in steps:
        name = _stored(subject, step)
        if step.part != "denoiser" or name not in _HIGH:
            continue
        wanted = FORMATS.get(step.decision.format)
        reason = step.decision.reason.partition("; already")[0]
        if wanted is not None and step.decision.format not in _HIGH:
            reason = "kept by an option of the run, or by its source"  # the type would pack it
        row = counts[(name, reason.removesuffix(": high precision"))]
        row[0] += 1
        row[1] += step.parameters
    return tuple(Kept(*key, *row) for key, row in sorted(counts.items(), key=lambda x: -x[1][1]))
