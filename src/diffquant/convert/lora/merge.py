"""Merging LoRAs: files are opened and matched before anything is written, then applied in the loop.

    BASE, LORA:0.8, LORA -> matched -> Request.changes -> the one streaming pass -> MergeReport

The adapters' files stay open while the plan runs: factors are read for the chunk at hand.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffquant.convert.adapters import Adapter as Change
from diffquant.convert.binding import bind
from diffquant.convert.job_report import JobReport
from diffquant.convert.jobs import opened
from diffquant.convert.logical import LogicalSource
from diffquant.convert.lora.alphas import peft_config
from diffquant.convert.lora.base import UNKNOWN, guess_base
from diffquant.convert.lora.deltas import Parts
from diffquant.convert.lora.distilled import distilled_of
from diffquant.convert.lora.group import Adapter, AdapterFile, group_adapters
from diffquant.convert.lora.layers import LayerChange, MergedLayer
from diffquant.convert.lora.match import AdapterMatch, match_adapters, obstacle
from diffquant.convert.lora.merge_report import LayerRow, LoraRow, MergeReport
from diffquant.convert.lora.modules import Model, model_of
from diffquant.convert.match import Match, to_canonical
from diffquant.convert.output import fingerprint
from diffquant.convert.request import Request
from diffquant.convert.several import SeveralReport
from diffquant.core.errors import ArchitectureError, MalformedFile, UsageError, shorten
from diffquant.io import open_source
from diffquant.quant.formats import FORMATS

__all__ = ["MERGED_KEY", "LoraInput", "Merge", "merging"]

# Header pair of the output: names, strengths and fingerprints of what was merged.
MERGED_KEY = "diffquant.merged"
_LOW_SURVIVAL = 0.5
_ALTERNATIVES = "generate --lora keeps a LoRA beside the packed weights, and loses nothing"
_Place = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LoraInput:
    """A file and its strengths, in the denoiser and in text encoders."""

    path: Path
    weight: float = 1.0
    encoder_weight: float = 1.0

    def strength(self, part: str) -> float:
        """What the file's changes of a part are multiplied by."""
        return self.encoder_weight if part.startswith("text_encoder") else self.weight

    @property
    def label(self) -> str:
        """How reports call it: style.safetensors:0.8."""
        strength = f":{self.weight:g}" if self.weight != 1 else ""
        other = self.encoder_weight != self.weight
        return f"{self.path.name}{strength}" + (
            f" (text encoders {self.encoder_weight:g})" if other else ""
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """One opened file, and what of it fits the base."""

    given: LoraInput
    fingerprint: str
    file: AdapterFile
    match: AdapterMatch
    base: str
    recipe: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Matched files, ready to be applied.

    Attributes:
        layers: (part, canonical key) -> its changes.
        packed: places whose weights are low-bit in the base.
        found: the files.
    """

    layers: Mapping[_Place, MergedLayer] = field(default_factory=dict)
    packed: frozenset[_Place] = frozenset()
    found: tuple[_Found, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, which are read while the output is written."""
        return tuple(one.given.path for one in self.found)

    def into(self, request: Request) -> Request:
        """The request, with the changes and a header pair that names the files."""
        if not self.found:
            return request
        changes: dict[str, dict[str, tuple[Change, ...]]] = {
            part: dict(rows) for part, rows in request.changes.items()
        }
        for (part, key), layer in self.layers.items():
            rows = changes.setdefault(part, {})
            rows[key] = (*rows.get(key, ()), layer)
        names = ", ".join(f"{one.given.label} {one.fingerprint[:16]}" for one in self.found)
        pairs = {**request.pairs, MERGED_KEY: names}
        return replace(request, changes=changes, pairs=pairs)

    def told(self, job: JobReport) -> JobReport:
        """The job's report, with what became of every file, and its warnings."""
        if not self.found:
            return job
        written = {(row.part, row.key) for row in job.tensors}
        layers = () if job.dry_run else tuple(self._layers(job))
        known = [one.survival for one in layers if one.survival is not None]
        rows = tuple(
            self._row(index, one, written, dry_run=job.dry_run)
            for index, one in enumerate(self.found)
        )
        report = MergeReport(rows, layers, statistics.median(known) if known else None)
        return replace(job, merged=report, warnings=(*job.warnings, *_warnings(report)))

    def told_each(self, several: SeveralReport) -> SeveralReport:
        """The same for every output of one pass."""
        outputs = tuple(self.told(one) for one in several.outputs)
        new = dict.fromkeys(
            text
            for one, before in zip(outputs, several.outputs, strict=True)
            for text in one.warnings[len(before.warnings) :]
        )
        return replace(several, outputs=outputs, warnings=(*several.warnings, *new))

    def _layers(self, job: JobReport) -> Iterator[LayerRow]:
        errors = _errors(job)
        for (part, key), layer in self.layers.items():
            tally = layer.tally
            if not tally.chunks:
                continue
            size, change = tally.weight, tally.change
            error = errors.get((part, key)) if (part, key) in self.packed else None
            survival = None
            if error is not None and change:
                survival = max(1 - error * tally.merged / change, 0.0)
            yield LayerRow(part, key, change / size if size else None, survival)

    def _row(self, index: int, found: _Found, written: set[_Place], *, dry_run: bool) -> LoraRow:
        names: set[str] = set()
        unwritten: dict[str, set[str]] = {}
        largest, largest_key = 0.0, ""
        for (part, key), layer in self.layers.items():
            for at, one in enumerate(layer.changes):
                if one.file != index:
                    continue
                if (part, key) not in written:
                    unwritten.setdefault(part, set()).add(one.parts.adapter.name)
                    continue
                names.add(one.parts.adapter.name)
                share = _share(layer.tally.of(at), layer.tally.weight)
                if share > largest:
                    largest, largest_key = share, key
        absent = Counter(part for _, part in found.match.absent)
        absent.update({part: len(rows) for part, rows in unwritten.items()})
        kinds = {one.adapter.name: one.adapter.label for one in found.match.targets}
        return LoraRow(
            path=str(found.given.path),
            weight=found.given.weight,
            encoder_weight=found.given.encoder_weight,
            base=found.base,
            kinds=dict(Counter(kinds.values())),
            merged=len(kinds),
            written=len(names),
            largest=None if dry_run else largest,
            largest_key=largest_key,
            absent=dict(absent),
            skipped=(
                *found.match.unmatched,
                *found.match.mismatched,
                *((one.name, one.reason) for one in found.file.broken),
            ),
            ignored=_ignored(found.file),
            recipe=found.recipe,
        )


@contextlib.contextmanager
def merging(
    base: Path, loras: Sequence[LoraInput], *, arch: str = "", allow_missing: bool = False
) -> Iterator[Merge]:
    """Open LoRAs and match them with a base; they stay open inside the context.

    Args:
        base: a checkpoint.
        loras: in the order in which they are applied.
        arch: as `recognise` takes it.
        allow_missing: leave out layers that the base has no weight for, or one of another shape.

    Raises:
        ArchitectureError: not adapters, none that fits, or some that do not.
        MalformedFile: parts that contradict each other.
        UsageError: a weight that is NaN or infinite.
    """
    if not loras:
        yield Merge()
        return
    for given in loras:
        if not math.isfinite(given.weight) or not math.isfinite(given.encoder_weight):
            raise UsageError(f"{given.path}: expected finite weights, found {given.label}")
    with contextlib.ExitStack() as stack:
        with opened(base, arch=arch) as (_, logical, match):
            model = model_of(match)
            packed = _packed(match, logical)
        changes: dict[_Place, list[LayerChange]] = {}
        found = []
        for index, given in enumerate(loras):
            source = bind(stack.enter_context(open_source(given.path)))
            one = _read(given, source, model, allow_missing=allow_missing)
            found.append(one)
            config = peft_config(source.source)
            for target in one.match.targets:
                parts = Parts(target.adapter, source, target.rows, target.tail, config)
                change = LayerChange(
                    index,
                    parts,
                    target.spans,
                    given.strength(target.part),
                    target.bias,
                    target.transposed,
                )
                changes.setdefault((target.part, target.key), []).append(change)
        yield Merge(
            {
                place: MergedLayer(_name(rows, loras), tuple(rows))
                for place, rows in changes.items()
            },
            packed,
            tuple(found),
        )


def _name(changes: Sequence[LayerChange], loras: Sequence[LoraInput]) -> str:
    files = dict.fromkeys(one.file for one in changes)
    return "merged " + ", ".join(loras[index].label for index in files)


def _packed(match: Match, logical: LogicalSource) -> frozenset[_Place]:
    return frozenset(
        (part.name, one.target)
        for part in match.parts
        for one in to_canonical(part)
        if any(logical.tensors[piece.key].is_quantized for piece in one.pieces)
    )


def _read(
    given: LoraInput,
    source: LogicalSource,
    model: Model,
    *,
    allow_missing: bool,
) -> _Found:
    """Group one file's adapters and match them."""
    path = given.path
    file = group_adapters(source.source)
    if file is None or not (file.adapters or file.broken):
        first = next(iter(source.source.specs), "no tensors")
        raise ArchitectureError(f"{path}: no LoRA or other adapter in it (first tensor: {first})")
    for one in file.broken:
        if not (one.half and allow_missing):
            raise MalformedFile(f"{one.name}: {one.reason} (tensor {one.key})", path=path)
    fitting = _mergeable(match_adapters(file.adapters, model))
    guess = guess_base(file.adapters)
    base = guess.architecture
    _check_fit(given, file.adapters, fitting, model, base, allow_missing=allow_missing)
    metadata = source.source.metadata
    titles = [str(metadata.get(key, "")) for key in ("modelspec.title", "ss_output_name")]
    hint = distilled_of([path.stem, *titles], model.architecture)
    recipe = f"{hint.title}: {hint.advice} ({hint.source})" if hint else ""
    return _Found(given, fingerprint(source.source), file, fitting, base, recipe)


def _mergeable(match: AdapterMatch) -> AdapterMatch:
    """With what fits and cannot be merged among the unmatched, by its reason."""
    return AdapterMatch(
        tuple(
            replace(one, verdict="unmatched", reason=why, absent=False)
            if (why := obstacle(one)) and not one.absent
            else one
            for one in match.placed
        )
    )


def _check_fit(
    given: LoraInput,
    adapters: Sequence[Adapter],
    fitting: AdapterMatch,
    model: Model,
    base: str,
    *,
    allow_missing: bool,
) -> None:
    bad = (*fitting.mismatched, *fitting.unmatched)
    none = not fitting.targets
    if not bad and not none:
        return
    listed = [f"{name} ({why})" for name, why in bad]
    listed += [f"{name} (the base has no {part})" for name, part in fitting.absent if none]
    looks = f"; it looks made for {base}" if base not in (UNKNOWN, model.architecture) else ""
    if none:
        raise ArchitectureError(
            f"{given.path}: none of its {len(adapters)} layers fits this {model.architecture} "
            f"base{looks}: {shorten(listed, 2)}"
        )
    if not allow_missing:
        raise ArchitectureError(
            f"{given.path}: {len(bad)} of its {len(adapters)} layers do not fit this "
            f"{model.architecture} base{looks}: {shorten(listed, 3)}; --allow-missing merges the "
            "others"
        )


def _share(change: float, weight: float) -> float:
    """A change in proportion to its weight; infinite where the weight is zero."""
    if weight:
        return change / weight
    return math.inf if change else 0.0


def _ignored(file: AdapterFile) -> tuple[tuple[str, str], ...]:
    vectors = ((key, "a token's vectors, which are not part of a model") for key in file.vectors)
    return (*file.ignored, *vectors)


def _errors(job: JobReport) -> dict[_Place, float]:
    """Relative error of weights that are low-bit in the output, by canonical place."""
    sums: dict[_Place, tuple[float, int]] = {}
    for row in job.tensors:
        fmt = FORMATS.get(row.stored)
        if row.error is not None and fmt is not None and not fmt.is_cast:
            square, count = sums.get((row.part, row.key), (0.0, 0))
            sums[row.part, row.key] = (
                square + row.error**2 * row.parameters,
                count + row.parameters,
            )
    return {place: (square / count) ** 0.5 for place, (square, count) in sums.items() if count}


def _warnings(report: MergeReport) -> Iterator[str]:
    for row in report.loras:
        name = Path(row.path).name
        for part, count in row.absent.items():
            yield f"{name}: not applied: {count} layers for {part}, which the output does not have"
        if row.skipped:
            listed = shorten([f"{layer} ({why})" for layer, why in row.skipped], 2)
            yield f"{name}: {len(row.skipped)} layers are left out: {listed}"
        if row.ignored:
            listed = shorten([f"{key} ({why})" for key, why in row.ignored], 2)
            yield f"{name}: {len(row.ignored)} tensors are not used: {listed}"
        if row.largest == 0.0 and row.written:
            yield f"{name}: it changes nothing: every change is zero"
    known = [one.survival for one in report.layers if one.survival is not None]
    low = sum(one < _LOW_SURVIVAL for one in known)
    if low:
        yield (
            f"of {len(known)} packed weights, {low} keep less than half of what was merged into "
            f"them (median {report.survival:.0%}): {_ALTERNATIVES}; so does merging into the "
            "unquantized checkpoint and quantizing that, with --error-lora where it must be exact"
        )
