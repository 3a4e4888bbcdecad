"""What `batch` shows: a row per output, and what the batch took or would take."""

from __future__ import annotations

from diffquant.cli.frame import echo, human, table
from diffquant.cli.screen import count, wrap
from diffquant.publish.batch import BatchReport
from diffquant.publish.batch.report import OutputRow

__all__ = ["render_batch"]


def render_batch(report: BatchReport) -> None:
    """Print the table of outputs, then totals; of a dry run the jobs as well."""
    judged = any(row.psnr_db is not None for row in report.outputs)
    extra = ("PSNR",) if judged else ()
    table(  # names come last: the longest alone runs over the edge of a narrow terminal
        ("type", "size", "bits/weight", "error", "verdict", *extra, "what", "output"),
        [_row(row, judged=judged) for row in report.outputs],
        right=(1, 2, 3),
    )
    echo()
    for row in report.outputs:
        if row.state not in ("new", "done"):
            echo(f"  {row.name}: {row.state}")
        for line in (one for note in row.notes for one in wrap(f"{row.name}: {note}")):
            echo(line)
    for note in report.notes:
        echo(f"  {note}")
    if report.dry_run:
        table(
            ("job", "outputs", "threads", "memory"),
            [
                (job.label, str(job.outputs), str(job.threads), human(job.peak_nbytes))
                for job in report.jobs
            ],
            right=(1, 2, 3),
        )
        echo()
    counts: dict[str, int] = {}
    for row in report.outputs:
        counts[row.result] = counts.get(row.result, 0) + 1
    states = ", ".join(f"{number} {state}" for state, number in counts.items())
    echo(f"  {count(len(report.outputs), 'output')} in {report.output}: {states}")
    verb = "to write" if report.dry_run else "written"
    if report.dry_run or report.jobs:
        at_once = count(report.processes, "process", "processes")
        where = at_once if report.where == "processes" else report.where
        echo(
            f"  {human(report.needed_nbytes)} {verb} of {human(report.nbytes)}, "
            f"{human(report.free_nbytes)} were free; {where}, {count(report.threads, 'thread')}"
        )


def _row(row: OutputRow, *, judged: bool) -> tuple[str, ...]:
    picture = ("-" if row.psnr_db is None else f"{row.psnr_db:.1f} dB",) if judged else ()
    return (
        row.type,
        human(row.nbytes),
        f"{row.bits_per_weight:.2f}",
        "-" if row.error is None else f"{row.error:.4f}",
        row.verdict or "-",
        *picture,
        row.result,
        row.name,
    )
