"""verify(): does a file hold what its source holds? Load, tensors, image; then one verdict.

- *load*: the candidate opens, is the same architecture, and has every weight of its source.
- *tensors*: every weight decoded and compared in canonical space. Relative RMSE up to 1.5 times the
  format's Gaussian value passes, up to 3 times warns, beyond or non-finite fails.
- *image*: the pictures of both sides are compared (compare.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from diffquant.convert.bias import BIAS_CORRECTION
from diffquant.convert.canonical_rows import canonical_rows
from diffquant.convert.detect import PartMatch, to_canonical
from diffquant.convert.jobs import opened
from diffquant.convert.logical import LogicalSource
from diffquant.convert.rules import Assignment
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.quant.formats import FORMATS, matrix_shape
from diffquant.quant.metrics import ErrorStats, verdict_of
from diffquant.runtime.compare import ImageReport, ImageSettings, Pictures, compare_pictures

__all__ = [
    "LEVELS",
    "LoadReport",
    "TensorError",
    "TensorsReport",
    "VerifyReport",
    "verify",
    "worst_of",
]

LEVELS = ("load", "tensors", "image")
_ROWS_AT_ONCE = 1 << 22  # weights compared at once
_WORST = 10
_ORDER = ("pass", "warn", "fail")


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far one weight is from its source."""

    key: str
    part: str
    stored: str
    error: float
    verdict: str


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Whether the candidate opens and is complete; `problems` say what is not."""

    verdict: str
    architecture: str
    weights: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorsReport:
    """Weight errors: the worst first, and relative RMSE over all quantized weights.

    `corrected` counts biases that differ on purpose (`--bias-correction`) and are not judged.
    """

    verdict: str
    error: float | None
    compared: int
    worst: tuple[TensorError, ...]
    corrected: int = 0


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The verdict and what it rests on; levels that were not run are None."""

    level: str
    verdict: str
    load: LoadReport
    tensors: TensorsReport | None = None
    image: ImageReport | None = None
    warnings: tuple[str, ...] = ()
    pictures: Pictures | None = None


def worst_of(verdicts: Sequence[str]) -> str:
    """The worst verdict of several; pass when there is none."""
    return max(verdicts, key=_ORDER.index, default="pass")


def verify(
    candidate: Path,
    against: Path,
    *,
    level: str = "image",
    settings: ImageSettings | None = None,
    base: Path | None = None,
    vae: Path | None = None,
    progress: Progress = NO_PROGRESS,
) -> VerifyReport:
    """Judge `candidate` against the source it was made from.

    Args:
        candidate: any file or folder we read.
        against: its source.
        level: load, tensors or image; each includes the ones before.
        settings: for the image level.
        base: where the candidate's missing parts come from; default: `against`.
        vae: VAE file used on both sides.
        progress: told about compared weights and pictures.

    Raises:
        DiffquantError: a side cannot be read or run at all.
    """
    load, tensors = _weights_level(candidate, against, level, progress)
    verdicts = [load.verdict, *([tensors.verdict] if tensors else [])]
    if level != "image" or load.verdict == "fail":
        return VerifyReport(level, worst_of(verdicts), load, tensors)
    image, pictures, warnings = compare_pictures(
        candidate, against, settings or ImageSettings(), base=base, vae=vae, progress=progress
    )
    verdicts.append(image.verdict)
    return VerifyReport(level, worst_of(verdicts), load, tensors, image, warnings, pictures)


def _weights_level(
    candidate: Path, against: Path, level: str, progress: Progress
) -> tuple[LoadReport, TensorsReport | None]:
    sides = (opened(path, alone=True) for path in (against, candidate))
    with next(sides) as (_, left, source), next(sides) as (_, right, found):
        problems = []
        if source.architecture != found.architecture:
            problems.append(f"expected {source.architecture}, found {found.architecture}")
        pairs = []
        have = {part.name: part for part in found.parts}
        reference = {part.name: part for part in source.parts}
        for name, part in have.items():
            if name not in reference:
                problems.append(f"the source has no {name}")
                continue
            paired, missing = _pair(reference[name], part)
            pairs += [(name, a, b) for a, b in paired]
            problems += missing
        if "denoiser" in reference and "denoiser" not in have:
            problems.append("no denoiser")
        verdict = "fail" if problems else "pass"
        load = LoadReport(verdict, found.architecture, len(pairs), tuple(problems))
        if level == "load" or problems:
            return load, None
        corrected = BIAS_CORRECTION in right.source.metadata
        return load, _compare_weights(left, right, pairs, progress, corrected=corrected)


def _pair(
    reference: PartMatch, part: PartMatch
) -> tuple[list[tuple[Assignment, Assignment]], list[str]]:
    """Match canonical weights of both sides; what is missing or reshaped is a problem."""
    ours = {a.target: a for a in to_canonical(part)}
    paired, problems = [], []
    for theirs in to_canonical(reference):
        mine = ours.pop(theirs.target, None)
        if mine is None:
            problems.append(f"{part.name}: {theirs.target} is missing")
        elif matrix_shape(mine.shape) != matrix_shape(theirs.shape):
            problems.append(
                f"{part.name}: {theirs.target} expected {theirs.shape}, found {mine.shape}"
            )
        else:
            paired.append((theirs, mine))
    problems += [f"{part.name}: {key} is not in the source" for key in ours]
    return paired, problems


def _compare_weights(
    left: LogicalSource,
    right: LogicalSource,
    pairs: Sequence[tuple[str, Assignment, Assignment]],
    progress: Progress,
    *,
    corrected: bool,
) -> TensorsReport:
    """Compare; `corrected` says that biases of packed weights differ on purpose."""
    packed = {mine.target for _, _, mine in pairs if right.tensors[mine.pieces[0].key].is_quantized}
    rows = []
    squared, size, shifted = 0.0, 0, 0
    progress.start("compare", sum(int(np.prod(a.shape, dtype=np.int64)) for _, a, _ in pairs), "w")
    for part, theirs, mine in pairs:
        tensor = right.tensors[mine.pieces[0].key]
        if not tensor.is_float:
            continue
        stats = ErrorStats()
        n, k = matrix_shape(theirs.shape)
        step = max(_ROWS_AT_ONCE // max(k, 1), 1)
        for start in range(0, n, step):
            span = (start, min(start + step, n))
            stats.add(canonical_rows(left, theirs, span), canonical_rows(right, mine, span))
            progress.advance((span[1] - start) * k, theirs.target)
        stored = tensor.format or tensor.dtype.lower()
        error = stats.relative_rmse
        verdict = verdict_of(error, FORMATS[stored].gaussian_error if stored in FORMATS else 0.0)
        weight = f"{mine.target.removesuffix('.bias')}.weight"
        on_purpose = corrected and mine.target.endswith(".bias") and weight in packed
        if on_purpose and verdict != "pass" and isfinite(error):
            shifted += 1
            continue
        rows.append(TensorError(theirs.target, part, stored, error, verdict))
        if tensor.is_quantized:
            squared += error**2 * n * k
            size += n * k
    progress.stop()
    worst = sorted(rows, key=lambda row: (-_ORDER.index(row.verdict), -row.error))
    return TensorsReport(
        verdict=worst_of([row.verdict for row in rows]),
        error=(squared / size) ** 0.5 if size else None,
        compared=len(rows),
        worst=tuple(worst[:_WORST]),
        corrected=shifted,
    )
