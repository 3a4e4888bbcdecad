"""The page's table: which columns there are, and every cell as text with what to sort it by.

A metric that was asked for keeps its column when it is missing. Other columns stand only where some
row has a value, and `Table.absent` names the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from diffquant.publish.compare_tables import cell
from diffquant.publish.rows import number_text, size_text
from diffquant.runtime.comparison import METRICS, Comparison, Row

__all__ = ["VERDICTS", "Cell", "Head", "Line", "Table", "quality_text", "table_of"]

# Verdict -> CSS class, sign, word: a verdict is never told by colour alone.
VERDICTS = {
    "pass": ("good", "✓", "pass"),
    "warn": ("fair", "!", "warn"),
    "fail": ("bad", "✗", "fail"),
}
# Kind of a row that is no file -> what it is, and what is expected of it.
_KINDS = {"floor": ("noise floor", "limit"), "control": ("control", "must fail")}


@dataclass(frozen=True, slots=True)
class Cell:
    """Text, smaller lines below it, and a number to sort by ("" sorts last)."""

    text: str
    small: tuple[str, ...] = ()
    key: str = ""


@dataclass(frozen=True, slots=True)
class Head:
    """A column: `arrow` says which way is nearer to the reference."""

    title: str
    arrow: str = ""
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A row: `tag` is what it is when it is no file, `expected` what that must show."""

    row: Row
    tag: str
    expected: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Columns after the file's name and verdict; `reference` are the cells of the reference."""

    heads: tuple[Head, ...]
    reference: tuple[Cell, ...]
    lines: tuple[Line, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    read: Callable[[Row], float | None]
    text: Callable[[float], str]
    reference: Callable[[Comparison], float | None] = lambda _: None


_BEFORE = (
    _Column("Size", lambda row: row.nbytes, size_text, lambda it: it.reference_nbytes),
    _Column("Bits per weight", lambda row: row.bits_per_weight, lambda v: number_text(v, 2)),
)
_AFTER = (
    _Column("Weight error", lambda row: row.weight_error, lambda v: number_text(v, 4)),
    _Column("Latent error", lambda row: row.latent_error, lambda v: number_text(v, 4)),
    _Column(
        "Peak memory",
        lambda row: row.peak_mib,
        lambda v: size_text(v * 2**20) if math.isfinite(v) else number_text(v, 0),
        lambda it: it.reference_peak_mib,
    ),
    _Column(
        "Seconds per picture",
        lambda row: row.seconds,
        lambda v: number_text(v, 2),
        lambda it: it.reference_seconds,
    ),
)


def table_of(comparison: Comparison) -> Table:
    """Choose columns and write every cell."""
    before = [column for column in _BEFORE if _has(comparison, column)]
    after = [column for column in _AFTER if _has(comparison, column)]
    shown = {*before, *after}
    metrics = comparison.metrics
    heads = (
        *(Head(column.title) for column in before),
        *(_metric_head(comparison, metric) for metric in metrics),
        *(Head(column.title) for column in after),
    )
    lines = tuple(
        Line(
            row,
            *_KINDS.get(row.kind, ("", "")),
            (
                *(_plain(column, row, comparison) for column in before),
                *(_metric_cell(comparison, row, metric) for metric in metrics),
                *(_plain(column, row, comparison) for column in after),
            ),
        )
        for row in comparison.rows
    )
    reference = (
        *(_own(column, comparison) for column in before),
        *(_own_metric(comparison, metric) for metric in metrics),
        *(_own(column, comparison) for column in after),
    )
    absent = tuple(column.title for column in (*_BEFORE, *_AFTER) if column not in shown)
    return Table(heads, reference, lines, absent)


def quality_text(comparison: Comparison, row: Row) -> str:
    """The first metric that the row has, with its name: "PSNR 42.3 dB"."""
    if row.identical:
        return "identical pictures"
    for metric in comparison.metrics:
        if metric in row.values and row.values[metric].mean is not None:
            what = METRICS[metric]
            return f"{what.title} {cell(comparison, row, metric)} {what.unit}".rstrip()
    return ""


def _has(comparison: Comparison, column: _Column) -> bool:
    return any(column.read(row) is not None for row in comparison.rows)


def _key(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(float(value))


def _plain(column: _Column, row: Row, comparison: Comparison) -> Cell:
    value = column.read(row)
    if value is None:
        return Cell("–")
    small: tuple[str, ...] = ()
    if column.title == "Size" and comparison.reference_nbytes > 0:
        small = (f"{number_text(100 * value / comparison.reference_nbytes, 0)}%",)
    return Cell(column.text(value), small, _key(value))


def _own(column: _Column, comparison: Comparison) -> Cell:
    value = column.reference(comparison)
    return Cell("") if value is None else Cell(column.text(value), key=_key(value))


def _own_metric(comparison: Comparison, metric: str) -> Cell:
    value = comparison.reference_values.get(metric)
    if value is None or value.mean is None:
        return Cell("")
    return Cell(number_text(value.mean, METRICS[metric].digits), key=_key(value.mean))


def _metric_head(comparison: Comparison, metric: str) -> Head:
    what = METRICS[metric]
    title = f"{what.title}{f', {what.unit}' if what.unit else ''}"
    return Head(title, "↑" if what.better == "up" else "↓", comparison.missing.get(metric, ""))


def _metric_cell(comparison: Comparison, row: Row, metric: str) -> Cell:
    text, value = cell(comparison, row, metric), row.values.get(metric)
    if value is None:
        return Cell("–" if text == "-" else text)
    key = _key(value.mean)
    if value.mean is None and row.identical:
        key = "Infinity" if METRICS[metric].better == "up" else "-Infinity"
    digits = METRICS[metric].digits
    parts = []
    if value.low is not None and value.high is not None:
        parts.append(f"{number_text(value.low, digits)} to {number_text(value.high, digits)}")
    if value.worst is not None:
        parts.append(f"worst {number_text(value.worst, digits)}")
    return Cell("–" if text == "-" else text, tuple(parts), key)
