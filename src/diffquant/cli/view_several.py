"""What a run with several outputs shows: a row per output, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.cli.frame import echo, human, table
from diffquant.cli.job import JobOutcome, render_job, worst_of
from diffquant.convert.job_report import JobReport
from diffquant.convert.several import SeveralReport
from diffquant.core.report import to_json

__all__ = ["SeveralOutcome", "render_several"]

_WORST = 3  # weights named per output that failed or nearly did


@dataclass(frozen=True, slots=True)
class SeveralOutcome:
    """A run and its outputs with their pictures' verdicts; in JSON `outputs` has a job each."""

    report: SeveralReport
    outputs: tuple[JobOutcome, ...]

    def to_json(self) -> dict[str, Any]:
        """The run's fields, its outputs as `quantize` reports one."""
        return {**to_json(self.report), "outputs": [one.to_json() for one in self.outputs]}


def render_several(outcome: SeveralOutcome, *, verbose: bool = False) -> None:
    """Print the table of outputs and what one pass saved; with `verbose` every output in full."""
    report = outcome.report
    jobs = report.outputs
    folders = {str(Path(job.output).parent) for job in jobs}
    verb = "would write" if report.dry_run else "wrote"
    where = f" to {folders.pop()}" if len(folders) == 1 else ""
    variant = f" {jobs[0].variant}" if jobs[0].variant else ""
    echo(f"{verb} {len(jobs)} outputs{where}")
    echo(f"  {jobs[0].architecture}{variant}, from {report.source}")
    echo()
    judged = () if report.dry_run else ("error", "verdict")
    table(  # names come last: the longest alone runs over the edge of a narrow terminal
        ("type", "size", "bits/weight", *judged, "output"),
        [_row(one, bare=bool(where)) for one in outcome.outputs],
        right=(1, 2) if report.dry_run else (1, 2, 3),
    )
    echo()
    for note in _told(jobs):
        echo(f"  {note}")
    alone = sum(job.read_nbytes for job in jobs)
    verb = "reads" if report.dry_run else "read"
    echo(f"  {verb} {human(report.read_nbytes)} of weights; one by one it would be {human(alone)}")
    for job in jobs:
        for row in worst_of(job.tensors)[:_WORST]:
            echo(f"  {job.type}: {row.verdict}: {row.key} {row.stored} error {row.error:.4f}")
    if report.dry_run:
        echo(
            f"  working memory about {human(report.peak_nbytes)} with {report.workers} threads; "
            f"writes {human(sum(job.nbytes for job in jobs))}"
        )
    if verbose:
        for one in jobs:
            echo()
            render_job(one, verbose=True)


def _row(outcome: JobOutcome, *, bare: bool) -> tuple[str, ...]:
    job = outcome.job
    name = Path(job.output).name if bare else job.output
    size = (job.type, human(job.nbytes), f"{job.bits_per_weight:.2f}")
    if job.dry_run:
        return (*size, name)
    return (*size, "-" if job.error is None else f"{job.error:.4f}", job.verdict or "-", name)


def _told(jobs: Sequence[JobReport]) -> list[str]:
    """Notes of all outputs, each once."""
    common = set.intersection(*(set(job.notes) for job in jobs))
    notes = [note for note in jobs[0].notes if note in common]
    notes += [f"{job.type}: {note}" for job in jobs for note in job.notes if note not in common]
    return notes
