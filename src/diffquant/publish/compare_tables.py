"""A Comparison as text: cells as people read them, CSV for programs, Markdown for cards and issues.

Names of files and prompts may be hostile. In CSV a text that a spreadsheet would run as a formula
gets a leading apostrophe; in Markdown what would be markup is escaped; control characters are shown
as escapes in both. A metric that could not be computed reads "missing" in every format, and
Markdown says why.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping

from diffquant.core.shown import shown
from diffquant.publish.rows import size_text
from diffquant.runtime.comparison import METRICS, Comparison, Row

__all__ = ["cell", "csv_text", "markdown_text", "spread"]

MISSING, NONE, BROKEN, SAME = "missing", "-", "not finite", "identical"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def cell(comparison: Comparison, row: Row, metric: str) -> str:
    """The mean of a metric: a number, "identical", "not finite", "missing", or "-" for none."""
    if metric in comparison.missing:
        return MISSING
    value = row.values.get(metric)
    if value is None:
        return NONE
    if value.mean is None:
        return SAME if row.identical else NONE
    if not math.isfinite(value.mean):
        return BROKEN
    return f"{value.mean:.{METRICS[metric].digits}f}"


def spread(row: Row, metric: str) -> str:
    """Half the width of the 95 % interval, "±0.0012", or "" where there is none."""
    value = row.values.get(metric)
    if value is None or value.low is None or value.high is None:
        return ""
    half = (value.high - value.low) / 2
    return f"±{half:.{METRICS[metric].digits}f}" if math.isfinite(half) else ""


_Column = Callable[[Row], str | float | int | None]
_PLAIN: Mapping[str, _Column] = {
    "name": lambda row: row.name,
    "kind": lambda row: row.kind,
    "type": lambda row: row.type,
    "nbytes": lambda row: row.nbytes,
    "bits_per_weight": lambda row: row.bits_per_weight,
    "weight_error": lambda row: row.weight_error,
    "latent_error": lambda row: row.latent_error,
    "seconds": lambda row: row.seconds,
    "peak_mib": lambda row: row.peak_mib,
    "identical": lambda row: "yes" if row.identical else "no",
    "verdict": lambda row: row.verdict,
    "stored": lambda row: row.stored,
    "problems": lambda row: "; ".join(row.problems),
}


def csv_text(comparison: Comparison) -> str:
    """One line a row, floor and control included; numbers with a point, and "nan" as such.

    Columns: those of Row, then METRIC, METRIC_low, METRIC_high, METRIC_worst for each metric.
    """
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    parts = ("", "_low", "_high", "_worst")
    writer.writerow(
        [*_PLAIN, *(f"{metric}{part}" for metric in comparison.metrics for part in parts)]
    )
    for row in comparison.rows:
        cells = [_safe(read(row)) for read in _PLAIN.values()]
        for metric in comparison.metrics:
            value = row.values.get(metric)
            if value is None:
                told = MISSING if metric in comparison.missing else ""
                cells += [told] * len(parts)
                continue
            numbers = (value.mean, value.low, value.high, value.worst)
            cells += ["" if one is None else repr(one) for one in numbers]
        writer.writerow(cells)
    return made.getvalue()


def _safe(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        text = shown(value)
        return f"'{text}" if value.startswith(_FORMULA) or text.startswith(_FORMULA) else text
    return repr(value)


def markdown_text(comparison: Comparison) -> str:
    """A table with intervals, what was drawn, and what is missing and why."""
    width, height = comparison.size
    titles = [_title(metric) for metric in comparison.metrics]
    heads = ["file", "type", "size", "bits per weight", "weight error", *titles]
    heads += ["s per picture", "peak MiB", "verdict"]
    lines = [
        f"Compared with `{_code(comparison.reference)}` ({comparison.architecture}, "
        f"{size_text(comparison.reference_nbytes)}): {_escape(comparison.part)} differs.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'|'.join(['---', '---'] + ['---:'] * (len(heads) - 3) + ['---'])}|",
    ]
    for row in comparison.rows:
        cells = [
            f"`{_code(row.name)}`" if row.kind == "candidate" else f"*{_escape(row.name)}*",
            _escape(row.type) or NONE,
            NONE if row.nbytes is None else size_text(row.nbytes),
            _number(row.bits_per_weight, 2),
            _number(row.weight_error, 4),
            *(_with_interval(comparison, row, metric) for metric in comparison.metrics),
            _number(row.seconds, 2),
            _number(row.peak_mib, 0),
            row.verdict or NONE,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    cfg = "" if comparison.cfg is None else f", cfg {comparison.cfg:g}"
    lines += [
        "",
        f"{len(comparison.prompts)} prompts, seeds {', '.join(map(str, comparison.seeds))}, "
        f"{comparison.steps} steps{cfg}, {width}x{height}; {_escape(comparison.engine)}, "
        f"{_escape(comparison.device)}, {comparison.dtype}. In brackets: 95 % bootstrap intervals "
        "over pairs.",
    ]
    if comparison.synthetic:
        lines += ["", f"{_escape(comparison.synthetic)}"]
    notes = [f"{METRICS[name].title} is missing: {why}" for name, why in comparison.missing.items()]
    notes += [f"{row.name}: {text}" for row in comparison.rows for text in row.problems]
    notes += comparison.warnings
    if notes:
        lines += ["", *(f"- {_escape(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def _title(metric: str) -> str:
    row = METRICS[metric]
    return f"{row.title} {'↑' if row.better == 'up' else '↓'}"


def _with_interval(comparison: Comparison, row: Row, metric: str) -> str:
    text, value = cell(comparison, row, metric), row.values.get(metric)
    if text in (MISSING, NONE, BROKEN, SAME) or value is None:
        return text
    if value.low is None or value.high is None:
        return text
    digits = METRICS[metric].digits
    return f"{text} ({value.low:.{digits}f} to {value.high:.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return NONE
    return f"{value:.{digits}f}" if math.isfinite(value) else BROKEN


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", shown(text))


def _code(text: str) -> str:
    """Text for between backticks inside a table."""
    return shown(text).replace("`", "'").replace("|", "\\|")
