"""health(): are a file's weights what weights should be? Every number is decoded and counted.

What opening a file refuses (truncated, malformed) never comes this far; an audit looks at the rules
of containers; this looks at the numbers, at the hashes, and at what the header already showed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffquant.convert.workers import default_workers
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.inspect.copies import find_copies
from diffquant.inspect.encodings import encoding_warnings
from diffquant.inspect.hashes import FileHashes
from diffquant.inspect.health_findings import HealthFinding, Seen, findings
from diffquant.inspect.health_values import Values, look_at_values
from diffquant.inspect.subject import Subject

__all__ = ["HealthReport", "PartHealth", "health"]

Verdict = Literal["healthy", "suspicious", "damaged"]


@dataclass(frozen=True, slots=True)
class PartHealth:
    """The numbers of one part, or of what belongs to none ("").

    Attributes:
        name: denoiser, vae ..., "" for tensors outside of every part.
        tensors, weights: how many were decoded.
        bad: numbers that are NaN or infinite.
        zeros: exact zeros.
        tiny: numbers that float16 would make zero.
        beyond: numbers that float16 cannot hold.
        amax: largest finite magnitude.
    """

    name: str
    tensors: int
    weights: int
    bad: int
    zeros: int
    tiny: int
    beyond: int
    amax: float


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What a file's numbers show.

    Attributes:
        path: as the user gave it.
        verdict: damaged where a finding is an error, suspicious where one is a warning.
        errors, warnings: how many findings there are of each.
        findings: errors first.
        parts: the numbers, per part.
        hashes: of every file.
    """

    path: str
    verdict: Verdict
    errors: int
    warnings: int
    findings: tuple[HealthFinding, ...]
    parts: tuple[PartHealth, ...]
    hashes: tuple[FileHashes, ...]


def health(
    subject: Subject, *, workers: int | None = None, progress: Progress = NO_PROGRESS
) -> HealthReport:
    """Look at every number of a file, and hash it.

    Args:
        subject: the opened file.
        workers: threads, one per processor where None.
        progress: told about bytes.

    Raises:
        CheckpointError: a read fails.
    """
    count = workers or default_workers()
    values = look_at_values(subject.logical, workers=count, progress=progress)
    told = tuple(subject.logical.warnings) + encoding_warnings(subject.logical)
    copies = find_copies(subject.logical, values.stats)
    found = findings(Seen(subject, values, copies, told))
    errors = sum(one.severity == "error" for one in found)
    warnings = sum(one.severity == "warning" for one in found)
    return HealthReport(
        path=subject.path,
        verdict="damaged" if errors else "suspicious" if warnings else "healthy",
        errors=errors,
        warnings=warnings,
        findings=found,
        parts=_parts(subject, values),
        hashes=values.hashes,
    )


def _parts(subject: Subject, values: Values) -> tuple[PartHealth, ...]:
    names = {
        part.prefix + key: part.name
        for part in (subject.match.parts if subject.match else ())
        for key in part.shapes
    }
    groups: dict[str, list[str]] = {}
    for key in values.stats:
        groups.setdefault(names.get(key, ""), []).append(key)
    rows = []
    for name, keys in groups.items():
        seen = [values.stats[key] for key in keys]
        rows.append(
            PartHealth(
                name=name,
                tensors=len(seen),
                weights=sum(one.size for one in seen),
                bad=sum(one.nan + one.inf for one in seen),
                zeros=sum(one.zeros for one in seen),
                tiny=sum(one.tiny for one in seen),
                beyond=sum(one.beyond for one in seen),
                amax=max(one.amax for one in seen),
            )
        )
    return tuple(rows)
