"""run_jobs(): several outputs of one source in one pass, each as run_job would have written it.

open -> bind -> detect once; a plan per output; one stream that reads what they share once; then
every output is committed, re-opened and reported on its own. Nothing is committed before all of
them are whole, and an exception or Ctrl-C before that removes them all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffquant.convert.composed import ComposedSource
from diffquant.convert.engine import Output, peak_together, run_plans
from diffquant.convert.job_report import JobReport, job_report
from diffquant.convert.jobs import opened
from diffquant.convert.match import Match
from diffquant.convert.output import fingerprint
from diffquant.convert.placing import cards_worth, place
from diffquant.convert.plan import Plan, Request, make_plan
from diffquant.convert.remember import remember
from diffquant.convert.reread import verify_output
from diffquant.convert.resume import Resumed, left_by_another_run
from diffquant.convert.sharing import cut_alike, rows_read
from diffquant.convert.surroundings import (
    Surroundings,
    check_memory,
    metadata_of,
    refuse_own_source,
    surroundings,
)
from diffquant.convert.workers import default_workers
from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import TensorSink, TensorSource
from diffquant.io import open_sink
from diffquant.io.atomic import check_disk
from diffquant.io.importance import ImportanceMatrix
from diffquant.io.inputs import InputsFile
from diffquant.quant.cards import cards_for

__all__ = ["SeveralReport", "Wanted", "run_jobs"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """One of several outputs: the path to write, and what; its container is the request's."""

    path: Path
    request: Request


@dataclass(frozen=True, slots=True)
class SeveralReport:
    """What a run with several outputs planned or did.

    Attributes:
        outputs: a report per output, in the order asked for; their `read_nbytes` and `peak_nbytes`
            are those of the output alone.
        read_nbytes: bytes of weights read for all of them together.
        peak_nbytes: predicted working memory of the one pass.
        warnings: of all outputs; said once where they all have it, else with the output's type.
    """

    source: str
    dry_run: bool
    outputs: tuple[JobReport, ...]
    read_nbytes: int
    peak_nbytes: int
    workers: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Planned:
    path: Path
    plan: Plan
    around: Surroundings


def run_jobs(
    src: Path,
    wanted: Sequence[Wanted],
    *,
    base: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    workers: int | None = None,
    verify: str = "tensors",
    progress: Progress = NO_PROGRESS,
    matrix: ImportanceMatrix | None = None,
    inputs: InputsFile | None = None,
    beside: Sequence[Path] = (),
    device: str = "cpu",
) -> SeveralReport:
    """Plan, and unless `dry_run` write, several outputs in one pass over the source.

    Args:
        src: any source.
        wanted: the outputs; their requests agree on how the source is read (`arch`, `added`,
            `use_ema`).
        base: folder that configs and tokenizer files are taken from, for folder outputs.
        force: replace existing outputs.
        dry_run: plan only.
        workers: threads.
        verify: as for run_job, for every output.
        progress: told about bytes, for each output that they went into.
        matrix: importance matrix, for formats that weigh errors by one.
        inputs: statistics of layer inputs, as for run_job.
        beside: further files that are read meanwhile, and must not be written to.
        device: what encodes, as for run_job.

    Raises:
        UsageError: two outputs have one path, requests read the source differently, or as run_job.
        DiffquantError: as run_job; no output is left behind.
    """
    _check_paths(src, wanted, base, replaces=force or dry_run)
    for path in beside:
        for one in wanted:
            refuse_own_source(path, one.path, None)
    first = wanted[0].request
    if any(_reading(one.request) != _reading(first) for one in wanted):
        raise UsageError("outputs of one pass read one source in one way: run them one by one")
    count = workers or default_workers()
    sources = opened(
        src,
        arch=first.arch,
        parts=first.added,
        ema=first.use_ema,
        alone=all(one.request.type is None for one in wanted),
        quantized=True,
    )
    results: tuple[Resumed, ...] = tuple(Resumed((), 0, ()) for _ in wanted)
    with sources as (source, logical, match):
        plans = cut_alike(
            [make_plan(logical, match, one.request, matrix=matrix, inputs=inputs) for one in wanted]
        )
        if isinstance(source, ComposedSource):
            plans = tuple(replace(plan, notes=(*source.notes, *plan.notes)) for plan in plans)
        cards = cards_worth(device, plans, cards_for)
        plans = place(plans, cards)
        around = [surroundings(plan, match, source, base) for plan in plans]
        planned = [
            _Planned(one.path, replace(plan, notes=(*plan.notes, *beside.notes)), beside)
            for one, plan, beside in zip(wanted, plans, around, strict=True)
        ]
        read, memory = rows_read(logical, plans, count), peak_together(logical, plans, count)
        if not dry_run:
            check_memory(memory)
            _check_disks(planned)
            with contextlib.ExitStack() as stack:
                sinks = [
                    stack.enter_context(_sink(one, match, source, force=force)) for one in planned
                ]
                found = run_plans(
                    logical,
                    [
                        Output(one.plan, sink, one.plan.importance)
                        for one, sink in zip(planned, sinks, strict=True)
                    ],
                    workers=count,
                    progress=progress,
                    check=verify == "tensors",
                    hashes=verify == "tensors",
                    cards=cards,
                )
                for sink in sinks:
                    sink.commit()
            planned = [
                replace(one, path=sink.path) for one, sink in zip(planned, sinks, strict=True)
            ]
            results = tuple(
                Resumed(rows, 0, left_by_another_run(one.path))
                for rows, one in zip(found, planned, strict=True)
            )
            remember(fingerprint(source), src)
    reports = tuple(
        _verified(src, one, done, memory, count, verify, progress)
        for one, done in zip(planned, results, strict=True)
    )
    return SeveralReport(
        source=str(src),
        dry_run=dry_run,
        outputs=reports,
        read_nbytes=read,
        peak_nbytes=memory,
        workers=count,
        warnings=_together(reports),
    )


def _verified(
    src: Path,
    one: _Planned,
    done: Resumed,
    memory: int,
    workers: int,
    verify: str,
    progress: Progress,
) -> JobReport:
    """Open one output again, where it was written, and report it."""
    if done.results and verify != "none":
        verify_output(
            one.path,
            one.plan,
            done.results,
            hashes=verify == "tensors",
            workers=workers,
            progress=progress,
        )
    missing, told, dry_run = one.around.missing, one.around.warnings, not done.results
    return job_report(
        src, one.path, one.plan, done, missing, told, memory, workers, verify, dry_run
    )


def _reading(request: Request) -> tuple[object, ...]:
    return request.arch, request.added, request.use_ema


def _check_paths(src: Path, wanted: Sequence[Wanted], base: Path | None, *, replaces: bool) -> None:
    """Refuse outputs that would replace the source, each other, or what is there already."""
    taken: dict[Path, Path] = {}
    for one in wanted:
        target = one.path.resolve()
        if target in taken:
            raise UsageError(
                f"{one.path}: two outputs have this name; put {{type}} into the name, or write to "
                "a folder"
            )
        inside = next((other for other in taken if other in target.parents), None)
        if inside is not None:
            raise UsageError(f"{one.path} lies in {taken[inside]}, another output; choose another")
        taken[target] = one.path
        if one.path.exists():
            refuse_own_source(src, one.path, base)
            if not replaces:
                raise UsageError(f"{one.path} exists; use --force to replace it")
        for added in one.request.added:
            refuse_own_source(added.path, one.path, None)


def _check_disks(planned: Sequence[_Planned]) -> None:
    """All outputs of a folder must fit together; each sink checks its own only.

    Raises:
        ResourceError: they do not; nothing was written.
    """
    nbytes: dict[Path, int] = {}
    for one in planned:
        if one.path.parent.is_dir():
            nbytes[one.path.parent] = nbytes.get(one.path.parent, 0) + one.plan.nbytes
    for folder, total in nbytes.items():
        check_disk(folder / "all outputs", total)


def _sink(one: _Planned, match: Match, source: TensorSource, *, force: bool) -> TensorSink:
    request = one.plan.request
    return open_sink(
        one.path,
        one.plan.specs,
        metadata_of(one.plan, match, source, one.around.header),
        force=force,
        configs=one.around.configs,
        files=one.around.files,
        shard_nbytes=request.shard_nbytes,
    )


def _together(reports: Sequence[JobReport]) -> tuple[str, ...]:
    """Warnings of all outputs: bare where everyone has them, else after the type."""
    common = set.intersection(*(set(report.warnings) for report in reports))
    told = [text for text in reports[0].warnings if text in common]
    for report in reports:
        told += [f"{report.type}: {text}" for text in report.warnings if text not in common]
    return tuple(dict.fromkeys(told))
