"""`diffquant diff A B`: what differs between two checkpoints, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, echo, run, table
from diffquant.inspect.diff import DIFF_CLASSES, DiffReport, TensorDiff, diff

__all__ = ["command"]

_WORST = 8
_ACCEPTED = [row.name for row in DIFF_CLASSES.values() if row.accepted]


@click.command("diff")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--ref", type=click.Path(path_type=Path), help="The source of both: gives each file's error."
)
@click.option("--part", "parts", multiple=True, metavar="NAME", help="Compare only this part.")
@click.option(
    "--allow",
    type=click.Choice(_ACCEPTED),
    default=_ACCEPTED[-1],
    show_default=True,
    help="The last class that is no difference.",
)
@common
def command(
    a: Path, b: Path, ref: Path | None, parts: tuple[str, ...], allow: str, options: Options
) -> None:
    """Compare checkpoints A and B: identical bytes, equal values, another scale rule, or different.

    Exit code 3 when a tensor differs by more than --allow, is missing or has another shape; 1 means
    that a file could not be read.
    """

    def work() -> Outcome:
        report = diff(a, b, ref=ref, parts=parts, allow=allow, progress=options.bar())
        return Outcome(report, report.warnings, 0 if report.same else 3, ok=report.same)

    def render(report: DiffReport) -> None:
        _render(report, verbose=options.verbose > 0)

    run("diff", options, work, render)


def _render(report: DiffReport, *, verbose: bool) -> None:
    groups: dict[str, list[TensorDiff]] = {}
    for row in report.tensors:
        groups.setdefault(row.kind, []).append(row)
    echo(f"A {report.a}")
    echo(f"B {report.b}")
    if report.ref:
        echo(f"against {report.ref}")
    echo(f"  {len(report.tensors)} tensors, matched by {report.matched_by}")
    echo()
    table(
        ("class", "tensors", "weights", "worst", "stored as"),
        [
            (
                DIFF_CLASSES[kind].about,
                str(len(rows)),
                f"{sum(row.parameters for row in rows):,}",
                _error(max((row.error for row in rows if row.error is not None), default=None)),
                _mix(rows),
            )
            for kind, rows in groups.items()
        ],
        right=(1, 2, 3),
    )
    limit = list(DIFF_CLASSES).index(report.allow)
    beyond = [row for row in report.tensors if list(DIFF_CLASSES).index(row.kind) > limit]
    shown = report.tensors if verbose else tuple(beyond[:_WORST])
    if shown:
        echo()
        table(
            ("tensor", "class", "A", "B", "error", "A to ref", "B to ref", "note"),
            [_row(row) for row in shown],
            right=(4, 5, 6),
        )
        if not verbose and len(beyond) > _WORST:
            echo(f"  and {len(beyond) - _WORST} more (-v shows every tensor)")
    echo()
    echo("no real difference" if report.same else f"{len(beyond)} tensors differ")


def _row(row: TensorDiff) -> tuple[str, ...]:
    stored = [row.a or "-", row.b or "-"]
    if row.kind == "shape":
        stored = [f"{row.a} {row.shape_a}", f"{row.b} {row.shape_b}"]
    errors = [_error(value) for value in (row.error, row.error_a, row.error_b)]
    return (row.key, DIFF_CLASSES[row.kind].about, *stored, *errors, row.note)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _mix(rows: list[TensorDiff]) -> str:
    counts: dict[str, int] = {}
    for row in rows:
        text = row.a if row.a == row.b else f"{row.a or '-'} / {row.b or '-'}"
        counts[text] = counts.get(text, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: -item[1])
    head = ", ".join(f"{text} ({count})" for text, count in ranked[:3])
    return head if len(ranked) <= 3 else f"{head} and {len(ranked) - 3} more"
