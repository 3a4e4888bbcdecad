"""Weights of a file against its source's, decoded, in canonical space: the load and tensors levels.

Relative RMSE up to 1.5 times the format's Gaussian value passes, up to 3 times warns, beyond or
non-finite fails. A limit on the error of all quantized weights together is proved by a control:
what that error would be with the output rows of the largest block shifted by one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from diffquant.convert.bias import BIAS_CORRECTION
from diffquant.convert.canonical_rows import canonical_rows
from diffquant.convert.detect import Match, PartMatch, to_canonical
from diffquant.convert.jobs import opened
from diffquant.convert.logical import LogicalSource
from diffquant.convert.recipe_source import type_label
from diffquant.convert.rules import Assignment
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.quant.formats import FORMATS, matrix_shape
from diffquant.quant.metrics import ErrorStats, verdict_of

__all__ = ["LoadReport", "TensorError", "TensorsReport", "Weighed", "Weight", "weigh", "worst_of"]

_ROWS_AT_ONCE = 1 << 22  # weights compared at once
_WORST = 10
_ORDER = ("pass", "warn", "fail")
_BLOCK = re.compile(r"^(.*?\.\d+)\.")


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

    Attributes:
        error: None where nothing is quantized.
        corrected: biases that differ on purpose (`--bias-correction`) and are not judged.
        whole_error: over all weights, quantized or not.
        control_error: what `error` (`whole_error` where nothing is quantized) would be with the
            largest block's rows shifted; None where it was not asked for.
    """

    verdict: str
    error: float | None
    compared: int
    worst: tuple[TensorError, ...]
    corrected: int = 0
    whole_error: float | None = None
    control_error: float | None = None


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of the candidate: its error, and what it takes in the file."""

    error: TensorError
    size: int
    nbytes: int
    quantized: bool


@dataclass(frozen=True, slots=True)
class Weighed:
    """What comparing weights found.

    Attributes:
        weights: that were compared, in file order; biases corrected on purpose are left out.
        type: TYPES name the candidate goes by, "" where it has none.
        parts: names of the candidate's parts.
        nbytes: of the candidate's tensor files.
        alone: what the source calls the candidate, where that is one part in a file of its own.
    """

    load: LoadReport
    tensors: TensorsReport | None
    weights: tuple[Weight, ...]
    type: str
    parts: tuple[str, ...]
    nbytes: int
    alone: str = ""


def worst_of(verdicts: Sequence[str]) -> str:
    """The worst verdict of several; pass when there is none."""
    return max(verdicts, key=_ORDER.index, default="pass")


def weigh(
    candidate: Path,
    against: Path,
    *,
    numbers: bool = True,
    part: str | None = None,
    control: bool = False,
    progress: Progress = NO_PROGRESS,
) -> Weighed:
    """Compare the weights of two files.

    Args:
        candidate: any file we read; it may hold some of the source's parts alone.
        against: its source.
        numbers: decode and compare; False: names and shapes only.
        part: name of the one part that counts; None: all the candidate has. A candidate that is a
            part alone is compared with that part of a whole model.
        control: also compute `TensorsReport.control_error`.
        progress: told about compared weights.

    Raises:
        DiffquantError: a side cannot be read or is not recognised.
    """
    sides = (opened(path, alone=True) for path in (against, candidate))
    with next(sides) as (_, left, source), next(sides) as (file, right, found):
        alone = _alone(source, found) if part is None else ""
        pairs, problems = _matched(source, found, part or alone or None)
        verdict = "fail" if problems else "pass"
        load = LoadReport(verdict, found.architecture, len(pairs), tuple(problems))
        tensors: TensorsReport | None = None
        weights: tuple[Weight, ...] = ()
        if numbers and not problems:
            corrected = BIAS_CORRECTION in right.source.metadata
            tensors, weights = _compare(
                left, right, pairs, progress, corrected=corrected, control=control
            )
        label = type_label(right.source.metadata, found, right)
        parts = tuple(one.name for one in found.parts)
        return Weighed(load, tensors, weights, label, parts, file.nbytes, alone)


_Pair = tuple[str, Assignment, Assignment]  # part, the source's, the candidate's


def _matched(source: Match, found: Match, only: str | None) -> tuple[list[_Pair], list[str]]:
    """Pair weights of both sides, part by part; whatever does not fit is a problem."""
    reference = {part.name: part for part in source.parts}
    problems: list[str] = []
    pairs: list[_Pair] = []
    if only is None:
        have = {part.name: part for part in found.parts}
        if "denoiser" in reference and len(have) == 1 and "denoiser" not in have:
            names = ", ".join(f"{part.name} ({part.kind})" for part in source.parts)
            return [], [f"a {found.parts[0].kind} alone, the source has none: it has {names}"]
        if source.architecture != found.architecture:
            problems.append(f"expected {source.architecture}, found {found.architecture}")
    else:
        mine = _part_named(found, only, reference.get(only))
        have = {only: mine} if mine is not None else {}
        if mine is None:
            problems.append(f"no {only} in it (it has {', '.join(p.name for p in found.parts)})")
    for name, part in have.items():
        if name not in reference:
            problems.append(f"the source has no {name}")
            continue
        paired, missing = _pair(reference[name], part)
        pairs += [(name, theirs, mine) for theirs, mine in paired]
        problems += missing
    if only is None and "denoiser" in reference and "denoiser" not in have:
        problems.append("no denoiser")
    return pairs, problems


def _alone(source: Match, found: Match) -> str:
    """The part of a whole model that a text encoder or VAE in a file of its own is, "" for none.

    Recognised alone it has a name that is a guess: T5 is text_encoder_2 of one model and
    text_encoder_3 of another. Of several of a kind the one that fits best is meant.
    """
    if source.part("denoiser") is None or found.part("denoiser") is not None:
        return ""
    if len(found.parts) != 1:
        return ""
    (mine,) = found.parts
    same = [one for one in source.parts if one.kind == mine.kind]
    return min(same, key=lambda one: len(_pair(one, mine)[1])).name if same else ""


def _part_named(found: Match, name: str, like: PartMatch | None) -> PartMatch | None:
    """A part by its name, or the only one of its kind: a file of its own may call it otherwise."""
    exact = found.part(name)
    if exact is not None and (like is None or exact.kind == like.kind or len(found.parts) > 1):
        return exact
    return next((part for part in found.parts if like is not None and part.kind == like.kind), None)


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


@dataclass(slots=True)
class _Sum:
    """Relative errors of several weights, weighed by their sizes."""

    squared: float = 0.0
    size: int = 0

    def add(self, error: float, size: int) -> None:
        self.squared += error**2 * size
        self.size += size

    @property
    def error(self) -> float | None:
        return math.sqrt(self.squared / self.size) if self.size else None


def _compare(
    left: LogicalSource,
    right: LogicalSource,
    pairs: Sequence[_Pair],
    progress: Progress,
    *,
    corrected: bool,
    control: bool,
) -> tuple[TensorsReport, tuple[Weight, ...]]:
    """Compare; `corrected` says that biases of packed weights differ on purpose."""
    packed = {mine.target for _, _, mine in pairs if right.tensors[mine.pieces[0].key].is_quantized}
    largest = _largest_block(pairs, right) if control else ""
    found: list[Weight] = []
    sums, damaged = {True: _Sum(), False: _Sum()}, {True: _Sum(), False: _Sum()}
    shifted = 0
    progress.start("compare", sum(int(np.prod(a.shape, dtype=np.int64)) for _, a, _ in pairs), "w")
    for part, theirs, mine in pairs:
        tensor = right.tensors[mine.pieces[0].key]
        if not tensor.is_float:
            continue
        hurt = control and _block(part, theirs.target) == largest
        error, worse = _error(left, right, theirs, mine, progress, hurt=hurt)
        stored = tensor.format or tensor.dtype.lower()
        verdict = verdict_of(error, FORMATS[stored].gaussian_error if stored in FORMATS else 0.0)
        weight = f"{mine.target.removesuffix('.bias')}.weight"
        on_purpose = corrected and mine.target.endswith(".bias") and weight in packed
        if on_purpose and verdict != "pass" and isfinite(error):
            shifted += 1
            continue
        n, k = matrix_shape(theirs.shape)
        row = TensorError(theirs.target, part, stored, error, verdict)
        found.append(Weight(row, n * k, _stored_nbytes(right, mine), tensor.is_quantized))
        sums[tensor.is_quantized].add(error, n * k)
        damaged[tensor.is_quantized].add(worse if hurt else error, n * k)
    progress.stop()
    whole = _together(sums[True], sums[False])
    bad = damaged[True] if damaged[True].size else damaged[False]
    rows = [one.error for one in found]
    worst = sorted(rows, key=lambda row: (-_ORDER.index(row.verdict), -row.error))
    report = TensorsReport(
        verdict=worst_of([row.verdict for row in rows]),
        error=sums[True].error,
        compared=len(rows),
        worst=tuple(worst[:_WORST]),
        corrected=shifted,
        whole_error=whole.error,
        control_error=bad.error if control else None,
    )
    return report, tuple(found)


def _together(a: _Sum, b: _Sum) -> _Sum:
    return _Sum(a.squared + b.squared, a.size + b.size)


def _error(
    left: LogicalSource,
    right: LogicalSource,
    theirs: Assignment,
    mine: Assignment,
    progress: Progress,
    *,
    hurt: bool,
) -> tuple[float, float]:
    """Relative RMSE of a weight, and that of the weight with its rows shifted (0 unless `hurt`)."""
    stats, worse = ErrorStats(), ErrorStats()
    n, k = matrix_shape(theirs.shape)
    step = max(_ROWS_AT_ONCE // max(k, 1), 1)
    for start in range(0, n, step):
        span = (start, min(start + step, n))
        exact, decoded = canonical_rows(left, theirs, span), canonical_rows(right, mine, span)
        stats.add(exact, decoded)
        if hurt:
            worse.add(exact, np.ascontiguousarray(np.roll(decoded, 1, axis=0)))
        progress.advance((span[1] - start) * k, theirs.target)
    return stats.relative_rmse, worse.relative_rmse if hurt else 0.0


def _block(part: str, key: str) -> str:
    """The repeated unit that a weight belongs to, as runtime/control.py damages them."""
    found = _BLOCK.match(key)
    return f"{part}.{found[1] if found else ''}"


def _largest_block(pairs: Sequence[_Pair], right: LogicalSource) -> str:
    """The block with the most quantized weights, or the most weights where none is."""
    sizes: dict[str, tuple[int, int]] = {}
    for part, theirs, mine in pairs:
        size = int(np.prod(theirs.shape, dtype=np.int64))
        name = _block(part, theirs.target)
        packed = size if right.tensors[mine.pieces[0].key].is_quantized else 0
        before = sizes.get(name, (0, 0))
        sizes[name] = (before[0] + packed, before[1] + size)
    return max(sizes, key=lambda name: sizes[name], default="")


def _stored_nbytes(logical: LogicalSource, assignment: Assignment) -> int:
    """Bytes of a weight in its file, companions included; a share where a tensor is split."""
    specs = logical.source.specs
    total = 0
    for piece in assignment.pieces:
        tensor = logical.tensors[piece.key]
        keys = {tensor.key, *tensor.parts.values()}
        nbytes = sum(specs[key].nbytes for key in keys if key in specs)
        rows = tensor.shape[0] if tensor.shape and assignment.axis == 0 else 1
        share = piece.stop - piece.start if assignment.axis == 0 else 1
        total += nbytes * min(share, rows) // max(rows, 1)
    return total
