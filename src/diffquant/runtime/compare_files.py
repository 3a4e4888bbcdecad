"""compare_files(): one reference and any number of candidates, through the same prompts and seeds.

Everything that can be known from headers is checked before a picture is drawn. Beside the files
stand the *floor* (the reference's denoiser in bfloat16) and the *control* (the first candidate with
one block damaged): a metric that does not see the control judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffquant import __version__
from diffquant.convert.jobs import opened
from diffquant.core.errors import ArchitectureError, MappingError, UsageError, shorten
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.runtime.compare_run import Run
from diffquant.runtime.compare_settings import CompareSettings, row_names
from diffquant.runtime.comparison import Comparison, ComparisonPictures, Row
from diffquant.runtime.drawing import compare_drawn
from diffquant.runtime.gates import GATES, check_limits
from diffquant.runtime.metrics import JUDGE_ROWS, check_names
from diffquant.runtime.providers import stand_ins_warning
from diffquant.runtime.weight_errors import weigh

__all__ = ["compare_files"]


def compare_files(
    reference: Path,
    candidates: Sequence[Path],
    settings: CompareSettings,
    *,
    progress: Progress = NO_PROGRESS,
) -> tuple[Comparison, ComparisonPictures]:
    """Draw, measure and judge.

    Args:
        reference: the source, or whatever the others are compared with.
        candidates: at least one; none of them the reference, none twice.
        settings: see there.
        progress: told about weights and steps.

    Raises:
        UsageError: a request that makes no sense.
        ArchitectureError: a candidate of another architecture.
        MappingError: a candidate that lacks weights, or has others.
        DiffquantError: a file that cannot be read or run.
    """
    _check(reference, candidates, settings)
    subject = _subject(reference)
    for path in candidates:
        _check_parts(path, reference, subject, settings)
    settings, told = _with_stand_ins(reference, candidates, settings)
    run = Run(reference, settings, progress)
    run.draw_reference()
    names = row_names(candidates)
    rows = [run.draw_candidate(name, path) for name, path in zip(names, candidates, strict=True)]
    own, _ = compare_drawn(run.exact, run.exact, run.shots, run.judges)
    return (
        Comparison(
            reference=row_names([reference])[0],
            reference_nbytes=subject.nbytes,
            architecture=subject.architecture,
            variant=subject.variant,
            part=settings.only or _differing(rows),
            prompts=settings.prompts,
            seeds=settings.seeds,
            steps=settings.steps,
            cfg=settings.cfg,
            size=run.shots.size,
            metrics=run.metrics,
            missing=run.judges.missing,
            gates={GATES[name].metric: limit for name, limit in settings.limits.items()},
            rows=(*rows, *run.beside),
            engine=run.engine,
            device=settings.device,
            dtype=settings.dtype,
            reference_score=own["prompt"].mean if "prompt" in own else None,
            tool=f"diffquant {__version__}",
            reference_values={name: own[name] for name in own if JUDGE_ROWS[name].alone},
            reference_seconds=run.exact.seconds,
            reference_peak_mib=run.reference_peak_mib,
            warnings=(*told, *run.warnings(rows)),
            synthetic=run.synthetic,
            sampler=settings.sampler or "",
        ),
        ComparisonPictures(run.exact.pictures, run.pictures),
    )


def _check(reference: Path, candidates: Sequence[Path], settings: CompareSettings) -> None:
    """Refuse what makes no sense before a file is opened."""
    check_limits(settings.limits)
    check_names(settings.metrics)
    if not candidates:
        raise UsageError("nothing to compare: give at least one file beside the reference")
    for what, listed in (("prompt", settings.prompts), ("seed", settings.seeds)):
        twice = next((one for one in listed if listed.count(one) > 1), None)
        if twice is not None:
            raise UsageError(
                f"{what} {twice!r} comes twice: its pairs would count twice in every interval"
            )
    if settings.synthetic and settings.only not in (None, "denoiser"):
        raise UsageError(f"--synthetic has no {settings.only}: it compares denoisers")
    if settings.engine != "bundled" and settings.only:
        raise UsageError(f"--only takes parts apart, --engine {settings.engine} cannot")
    seen: dict[Path, Path] = {}
    for path in candidates:
        place = path.resolve()
        if place == reference.resolve():
            raise UsageError(f"{path} is the reference itself: leave it out")
        if place in seen:
            raise UsageError(f"{path} is given twice ({seen[place]}): give it once")
        seen[place] = path


@dataclass(frozen=True, slots=True)
class _Subject:
    """What the reference is."""

    architecture: str
    variant: str
    nbytes: int


def _subject(reference: Path) -> _Subject:
    with opened(reference) as (source, _, match):
        return _Subject(match.architecture, match.variant, source.nbytes)


def _check_parts(path: Path, reference: Path, subject: _Subject, settings: CompareSettings) -> None:
    """Refuse, by its header, a candidate that cannot be compared."""
    weighed = weigh(path, reference, numbers=False, part=settings.only)
    load = weighed.load
    if settings.only is None and load.architecture != subject.architecture:
        more = f"; --only {weighed.alone} compares that alone" if weighed.alone else ""
        raise ArchitectureError(
            f"{path}: expected {subject.architecture} as {reference}, found "
            f"{load.architecture}{more}"
        )
    if load.problems and settings.only is not None and settings.only not in weighed.parts:
        raise UsageError(f"{path}: --only {settings.only}: {load.problems[0]}")
    if load.problems:
        whole = settings.only is None and "denoiser" in weighed.parts
        more = "; --only denoiser compares that alone" if whole else ""
        raise MappingError(
            f"{path}: not the weights of {reference}: {shorten(load.problems, 3)} "
            f"(diffquant diff shows all{more})"
        )


def _with_stand_ins(
    reference: Path, candidates: Sequence[Path], settings: CompareSettings
) -> tuple[CompareSettings, tuple[str, ...]]:
    """Settings for denoisers alone, where parts are nowhere to be found; and a warning of it."""
    if settings.synthetic or settings.engine != "bundled":
        return settings, ()
    sides = [(reference, settings.base)]
    if settings.only is None:
        sides += [(path, settings.base or reference) for path in candidates]
    told = stand_ins_warning(sides, settings.vae)
    if not told:
        return settings, ()
    if settings.only not in (None, "denoiser"):
        raise UsageError(f"--only {settings.only} takes a reference that draws pictures: {told}")
    return replace(settings, synthetic=True), (told,)


def _differing(rows: Sequence[Row]) -> str:
    """Parts in which some candidate's weights are not the reference's."""
    layers = (layer for row in rows for layer in row.layers)
    found = dict.fromkeys(layer.part for layer in layers if layer.error != 0)
    return ", ".join(found) or "denoiser"
