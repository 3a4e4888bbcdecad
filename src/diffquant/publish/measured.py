"""What `diffquant compare --json` measured, by file: the numbers that a card may show.

The file may come from anywhere: what is no number, no name of a file or no known metric is an
error that names the place, never a cell of the card.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.core.errors import MalformedFile, UsageError, shorten
from diffquant.runtime.comparison import METRICS

__all__ = ["Measured", "MeasuredRow", "cell", "read_comparison"]

_MAX_NBYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class MeasuredRow:
    """A file, the floor or the control: METRICS key -> (value, worst pair)."""

    name: str
    kind: str
    verdict: str
    identical: bool
    values: Mapping[str, tuple[float | None, float | None]]


@dataclass(frozen=True, slots=True)
class Measured:
    """A comparison, as far as a card speaks of it.

    Attributes:
        reference: what files were compared with.
        metrics: METRICS keys in column order; those without any value are in `missing`.
        pairs: how many prompts times seeds.
    """

    reference: str
    metrics: tuple[str, ...]
    missing: Mapping[str, str]
    rows: tuple[MeasuredRow, ...]
    pairs: int
    prompts: int
    seeds: int
    steps: int
    size: tuple[int, int]
    engine: str
    dtype: str
    tool: str

    def row(self, path: Path) -> MeasuredRow | None:
        """The row of a file: its name, or the end of its path where several had one name."""
        return next((r for r in self.rows if r.kind == "candidate" and _ends(path, r.name)), None)

    def named(self, kind: str) -> MeasuredRow | None:
        """The floor or the control."""
        return next((row for row in self.rows if row.kind == kind), None)


_ODD = (KeyError, TypeError, AttributeError, OverflowError)  # of another shape than expected


def read_comparison(path: Path, files: Sequence[Path]) -> Measured:
    """Read a comparison.

    Args:
        path: JSON that `diffquant compare --json` printed.
        files: what is published; one of them at least has to be in it.

    Raises:
        MalformedFile: no such JSON.
        UsageError: it is of other files.
    """
    if not path.is_file():
        raise UsageError(f"--comparison {path}: no such file")
    if path.stat().st_size > _MAX_NBYTES:
        raise MalformedFile(f"{path.stat().st_size} bytes of JSON", path=path)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        found = _measured(_inner(body))
    except (*_ODD, ValueError, RecursionError) as error:
        raise MalformedFile(
            f"not what `diffquant compare --json` prints ({type(error).__name__}: {error!s:.120})",
            path=path,
        ) from None
    known = [row.name for row in found.rows if row.kind == "candidate"]
    if not any(found.row(file) for file in files):
        twice = [name for name in known if "/" in name]
        hint = (
            ": it had several files of one name, told apart by their folders; publish the files "
            "from where they were compared"
            if any(_ends(file, name.rpartition("/")[2]) for name in twice for file in files)
            else ""
        )
        raise UsageError(
            f"--comparison {path}: measured {shorten(known) or 'no file'}, none of which is "
            f"published here ({shorten(file.name for file in files)}){hint}"
        )
    return found


def _ends(path: Path, name: str) -> bool:
    """Whether a path is called so, or ends so: rows of one file name have folders before it."""
    parts = tuple(part for part in name.split("/") if part)
    return bool(parts) and any(
        one.parts[-len(parts) :] == parts for one in (path.absolute(), path.resolve())
    )


def cell(row: MeasuredRow | None, key: str) -> str:
    """A value as a table has it: "-" where it was not measured."""
    if row is None or key not in row.values:
        return "-"
    if key == "psnr" and row.identical:
        return "identical"
    value = row.values[key][0]
    metric = METRICS[key]
    return "-" if value is None else f"{value:.{metric.digits}f} {metric.unit}".rstrip()


def _inner(body: Any) -> Mapping[str, Any]:  # noqa: ANN401 - whatever the file holds
    """The comparison in the envelope of --json, or bare."""
    for one in (body, body.get("result"), (body.get("result") or {}).get("comparison")):
        if isinstance(one, dict) and "rows" in one and "reference" in one:
            return one
    raise ValueError("it holds no comparison")


def _measured(one: Mapping[str, Any]) -> Measured:
    metrics = [str(key) for key in one["metrics"]]
    unknown = [key for key in metrics if key not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r:.60}")
    rows = tuple(_row(row) for row in one["rows"])
    width, height = one["size"]
    prompts, seeds = len(one["prompts"]), len(one["seeds"])
    return Measured(
        reference=str(one["reference"]),
        metrics=tuple(metrics),
        missing={str(key): str(value) for key, value in one["missing"].items()},
        rows=rows,
        pairs=prompts * seeds,
        prompts=prompts,
        seeds=seeds,
        steps=int(one["steps"]),
        size=(int(width), int(height)),
        engine=str(one.get("engine", "")),
        dtype=str(one.get("dtype", "")),
        tool=str(one.get("tool", "")),
    )


def _row(row: Mapping[str, Any]) -> MeasuredRow:
    values = {
        str(key): (_number(value["mean"]), _number(value.get("worst")))
        for key, value in row["values"].items()
        if key in METRICS
    }
    return MeasuredRow(
        name=str(row["name"]),
        kind=str(row["kind"]),
        verdict=str(row.get("verdict", "")),
        identical=row.get("identical") is True,
        values=values,
    )


def _number(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.60} is no number")
    return float(value)
