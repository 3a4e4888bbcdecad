"""`diffquant imatrix FILE... [-o OUT]`: look into importance matrices, merge and convert them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from diffquant.cli.frame import Options, Outcome, common, echo, run, table
from diffquant.io.imatrix import (
    ImportanceMatrix,
    check_target,
    merge_imatrices,
    read_imatrix,
    with_prefix,
    write_imatrix,
)

__all__ = ["command"]


@dataclass(frozen=True, slots=True)
class EntryRow:
    """One weight: columns, rows it was measured on, and how uneven its columns are driven.

    `spread` is the largest mean square over the mean of all: 1 where importance changes nothing.
    """

    name: str
    values: int
    count: int
    spread: float


@dataclass(frozen=True, slots=True)
class MatrixReport:
    """An importance matrix, of one file or merged."""

    files: tuple[str, ...]
    output: str
    entries: tuple[EntryRow, ...]
    chunks: int
    chunk_size: int
    datasets: tuple[str, ...]


@click.command("imatrix")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the merged matrix: .gguf, or .dat for older programs.",
)
@click.option(
    "--prefix",
    default="",
    metavar="TEXT",
    help="Put TEXT before every name: stable-diffusion.cpp wants model.diffusion_model.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common
def command(
    files: tuple[Path, ...], output: Path | None, prefix: str, force: bool, options: Options
) -> None:
    """Say what importance matrices hold; with -o, merge them into one or change their kind.

    Merging adds sums and counts, so every measured row weighs the same. -v lists every weight.
    """

    def work() -> Outcome:
        if output is not None:
            check_target(output, force=force)
        matrix = with_prefix(merge_imatrices([read_imatrix(path) for path in files]), prefix)
        if output is not None:
            write_imatrix(output, matrix, force=force)
        report = MatrixReport(
            files=tuple(str(path) for path in files),
            output="" if output is None else str(output),
            entries=_rows(matrix),
            chunks=matrix.chunk_count,
            chunk_size=matrix.chunk_size,
            datasets=matrix.datasets,
        )
        warnings = []
        if matrix.partial:
            warnings.append(
                f"{len(matrix.partial)} entries have matrices that never saw an input: their "
                "values count as 1"
            )
        return Outcome(report, warnings)

    def render(report: MatrixReport) -> None:
        if report.output:
            echo(f"wrote {report.output}")
        else:
            echo(", ".join(report.files))
        echo(f"  importance matrix, {len(report.entries)} weights, {report.chunks} chunks")
        if report.datasets:
            echo(f"  measured on {', '.join(report.datasets)}")
        if options.verbose:
            table(
                ("weight", "columns", "rows", "spread"),
                [
                    (row.name, str(row.values), str(row.count), f"{row.spread:.1f}")
                    for row in report.entries
                ],
                right=(1, 2, 3),
            )

    run("imatrix", options, work, render)


def _rows(matrix: ImportanceMatrix) -> tuple[EntryRow, ...]:
    rows = []
    for name, entry in sorted(matrix.entries.items()):
        values = entry.values().astype(np.float64)
        mean = float(values.mean())
        spread = float(values.max()) / mean if mean > 0 else 1.0
        rows.append(EntryRow(name, values.size, int(entry.counts.max()), round(spread, 4)))
    return tuple(rows)
