"""`diffquant inspect FILE...`: what files are, from their headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffquant.cli.audit import render_audit
from diffquant.cli.frame import Options, Outcome, common, echo, human, run, table
from diffquant.core.errors import DiffquantError
from diffquant.inspect import Encoding, FileReport, audit, describe

__all__ = ["command"]


@click.command("inspect")
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--explain", is_flag=True, help="Show the evidence and the metadata.")
@click.option(
    "--audit",
    "audited",
    is_flag=True,
    help="Check the file against the specifications of its container and formats instead.",
)
@click.option("--full", is_flag=True, help="With --audit: look at every block, not at samples.")
@common
def command(
    files: tuple[str, ...], explain: bool, audited: bool, full: bool, options: Options
) -> None:
    """Say what each FILE (or folder) is: architecture, parts, storage, size.

    Reads headers only. Unknown files are not an error; unreadable ones are. With --audit: which
    rules a file breaks; exit code 3 for a violation, warnings alone are 0.
    """
    if audited:
        run("inspect", options, lambda: _audit(files, full=full), render_audit)
    if full:
        raise click.UsageError("--full looks at blocks for --audit: give both")

    def work() -> Outcome:
        reports: list[FileReport] = []
        failures: list[DiffquantError] = []
        for path in files:
            try:
                reports.append(describe(path))
            except DiffquantError as error:
                if len(files) == 1:
                    raise
                failures.append(error)
        warnings = [f"{r.path}: {text}" for r in reports for text in r.warnings]
        code = max((error.exit_code for error in failures), default=0)
        errors = [str(error) for error in failures]
        return Outcome({"files": reports}, warnings, code, ok=not failures, errors=errors)

    def render(result: dict[str, Any]) -> None:
        for index, report in enumerate(result["files"]):
            if index:
                echo()
            _render(report, explain=explain)

    run("inspect", options, work, render)


def _audit(files: tuple[str, ...], *, full: bool) -> Outcome:
    reports = [report for path in files for report in audit(Path(path), full=full)]
    bad = any(report.violations for report in reports)
    return Outcome({"audits": reports}, (), 3 if bad else 0, ok=not bad)


def _render(report: FileReport, *, explain: bool) -> None:
    if report.kind == "imatrix":
        echo(report.path)
        echo(f"  importance matrix · {report.container}, {report.evidence[0]}")
        return
    name = report.architecture + (f" {report.variant}" if report.variant else "")
    layout = f", {report.layout} layout" if report.layout else ""
    echo(report.path)
    echo(f"  {report.kind} · {name} · {report.container}{layout}")
    echo(
        f"  {report.tensors} tensors, {report.parameters / 1e9:.3f} B parameters, "
        f"{human(report.nbytes)}"
    )
    stored = sorted(report.storage.items(), key=lambda row: -row[1].nbytes)
    listed = ", ".join(f"{dtype} {human(count.nbytes)}" for dtype, count in stored)
    echo(f"  stored as {listed}")
    if report.parts:
        echo()
        table(
            ("  part", "tensors", "parameters", "size", "weights stored as"),
            [
                (
                    f"  {part.name}",
                    str(part.tensors),
                    f"{part.parameters:,}",
                    human(part.nbytes),
                    _mix(part.formats, part.parameters),
                )
                for part in report.parts
            ],
            right=(1, 2, 3),
        )
    if report.encodings:
        echo()
        table(
            ("  packed as", "weights", "parameters", "dialect", "said by", "scale", "part"),
            [
                (
                    f"  {row.format}" + ("" if row.readable else " (cannot be read)"),
                    str(row.weights),
                    f"{row.parameters:,}",
                    row.dialect,
                    _said(row),
                    row.scale or "-",
                    row.part or "-",
                )
                for row in report.encodings
            ],
            right=(1, 2),
        )
    if report.candidates:
        echo("  nearest known architectures:")
        for slug, missing in report.candidates.items():
            echo(f"    {slug}: lacks {', '.join(missing[:3])}")
    if explain:
        for line in report.evidence:
            echo(f"  evidence: {line}")
        if report.leftovers:
            echo(f"  {len(report.leftovers)} tensors belong to no part:")
            for key, reason in list(report.leftovers.items())[:8]:
                echo(f"    {key}: {reason}")
        for key, value in report.metadata.items():
            echo(f"  {key} = {value}")


def _said(row: Encoding) -> str:
    """Where a file names the format, and what it calls it."""
    if not row.marker:
        return "-"
    return f"{row.marker}: {row.called or 'no format'}"


def _mix(formats: Any, total: int) -> str:  # noqa: ANN401 - Mapping[str, int]
    rows = sorted(formats.items(), key=lambda row: -row[1])
    return ", ".join(f"{name} {count / max(total, 1):.1%}" for name, count in rows[:4])
