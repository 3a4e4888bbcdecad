"""One comparison as the page's template takes it: everything chosen, written and laid out.

The template only places what stands here; whatever a reader could call a judgement (the headline,
what is shown first, which sizes do not compare) is decided in this file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffquant.publish.embedding import Embedded, Shot, embed, pair_labels
from diffquant.publish.layer_chart import LayerChart, layer_chart, stored_formats
from diffquant.publish.page_table import Table, quality_text, table_of
from diffquant.publish.plot import Plot, plot_of
from diffquant.publish.plot_axes import AXES
from diffquant.publish.rows import number_text, size_text
from diffquant.runtime.comparison import METRICS, Comparison, ComparisonPictures, PairValues, Row

__all__ = ["Chart", "Figure", "Pair", "Section", "section_of"]

_PIXELATED = 256  # pictures up to this side are enlarged by showing their pixels
_ENLARGED = 512  # CSS pixels that small pictures are enlarged to


@dataclass(frozen=True, slots=True)
class Chart:
    """One metric against one axis, for wide and for narrow screens."""

    axis: str
    axis_title: str
    metric: str
    wide: Plot
    narrow: Plot


@dataclass(frozen=True, slots=True)
class Figure:
    """A row's picture of a pair; `row` None is the reference, `shot` None is not embedded."""

    row: int | None
    name: str
    tag: str
    shot: Shot | None
    facts: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and a seed: the reference's figure first."""

    index: int
    label: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A comparison, ready for the template."""

    comparison: Comparison
    headline: str
    table: Table
    qualities: tuple[tuple[Row, str], ...]
    charts: tuple[Chart, ...]
    chosen_chart: int
    note: str
    embedded: Embedded | None
    pairs: tuple[Pair, ...]
    drawn: tuple[tuple[int, Row], ...]  # rows with pictures
    chosen: int  # the one that is shown first
    width: int  # of a picture, pixels
    height: int
    fit: int  # CSS pixels that a picture is enlarged to at most
    pixelated: bool
    layers: tuple[LayerChart, ...]
    chosen_layers: int
    formats: tuple[str, ...]
    made: tuple[tuple[str, str], ...]


def section_of(
    comparison: Comparison, pictures: ComparisonPictures, *, picture_limit: int
) -> Section:
    """Prepare a comparison.

    Raises:
        ValueError: pictures that are not one per prompt and seed, or an unknown metric.
    """
    unknown = [name for name in comparison.metrics if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r} (known: {', '.join(METRICS)})")
    embedded = embed(comparison, pictures, limit=picture_limit) if pictures.rows else None
    drawn = tuple((at, row) for at, row in enumerate(comparison.rows) if row.name in pictures.rows)
    formats = stored_formats(comparison)
    layers = tuple(
        chart for row in comparison.candidates if (chart := layer_chart(row, formats)) is not None
    )
    charts = _charts(comparison)
    mixed = _holds_other_parts(comparison)
    axis = "bits" if mixed else "size"
    height, width = pictures.reference[0].shape[:2] if pictures.reference else (0, 0)
    small = max(width, height) <= _PIXELATED
    return Section(
        comparison=comparison,
        headline=_headline(comparison),
        table=table_of(comparison),
        qualities=tuple((row, quality_text(comparison, row)) for row in comparison.candidates),
        charts=charts,
        chosen_chart=next((at for at, one in enumerate(charts) if one.axis == axis), 0),
        note=mixed,
        embedded=embedded,
        pairs=() if embedded is None else _pairs(comparison, embedded, drawn),
        drawn=drawn,
        chosen=_furthest([row for _, row in drawn]),
        width=width,
        height=height,
        fit=max(1, _ENLARGED // max(width, height, 1)) * width if small else width,
        pixelated=small,
        layers=layers,
        chosen_layers=_furthest([chart.row for chart in layers]),
        formats=formats,
        made=_made(comparison),
    )


def _headline(comparison: Comparison) -> str:
    """What a reader wants to know first."""
    judged = [row for row in comparison.candidates if row.verdict]
    good = [row for row in judged if row.verdict == "pass" and row.nbytes]
    if good:
        best = min(good, key=lambda row: row.nbytes or 0)
        share = ""
        if comparison.reference_nbytes > 0:
            share = f", {number_text(100 * (best.nbytes or 0) / comparison.reference_nbytes, 0)}%"
            share += " of the reference"
        told = quality_text(comparison, best)
        return (
            f"The smallest file that passes is {best.name}: {size_text(best.nbytes or 0)}{share}"
            f"{f', {told}' if told else ''}."
        )
    if judged:
        return "No file passes."
    return "No gates were asked for, so nothing is judged."


def _charts(comparison: Comparison) -> tuple[Chart, ...]:
    found = []
    for axis, what in AXES.items():
        for metric in comparison.metrics:
            wide = plot_of(comparison, metric, axis, width=760, height=330)
            narrow = plot_of(comparison, metric, axis, width=340, height=300)
            if wide is not None and narrow is not None:
                found.append(Chart(axis, what.title, METRICS[metric].title, wide, narrow))
    return tuple(found)


def _holds_other_parts(comparison: Comparison) -> str:
    """Say so where files hold unlike parts: then their sizes do not compare."""
    parts = {
        tuple(dict.fromkeys(layer.part for layer in row.layers))
        for row in comparison.candidates
        if row.layers
    }
    if len(parts) < 2:
        return ""
    return (
        "Not every file holds the same parts of the model, so sizes compare less well than bits "
        "per weight."
    )


def _pairs(
    comparison: Comparison, embedded: Embedded, drawn: Sequence[tuple[int, Row]]
) -> tuple[Pair, ...]:
    """Figures of every pair that has any, the reference first."""
    found = []
    for index, label in enumerate(pair_labels(comparison)):
        shots: Mapping[str | None, Shot] = embedded.pairs.get(index, {})
        if None not in shots:
            continue
        figures = [Figure(None, comparison.reference, "reference", shots[None], "")]
        for at, row in drawn:
            pair = row.pairs[index] if index < len(row.pairs) else None
            tag = "" if row.kind == "candidate" else row.kind
            facts = _pair_facts(comparison, pair)
            figures.append(Figure(at, row.name, tag, shots.get(row.name), facts))
        found.append(Pair(index, label, tuple(figures)))
    return tuple(found)


def _pair_facts(comparison: Comparison, pair: PairValues | None) -> str:
    """This picture's own values: "PSNR 42.3 dB; FLIP 0.0123; flat"."""
    if pair is None:
        return ""
    parts = []
    for metric in comparison.metrics:
        if metric in pair.values:
            what, value = METRICS[metric], pair.values[metric]
            text = "identical" if value is None else number_text(value, what.digits)
            parts.append(f"{what.title} {text} {what.unit if value is not None else ''}".rstrip())
    return "; ".join((*parts, *pair.defects))


def _furthest(rows: Sequence[Row]) -> int:
    """Index of the file that is furthest from the reference by PSNR, of the last without one."""

    def closeness(index: int) -> float:
        row = rows[index]
        value = row.values.get("psnr")
        if row.kind != "candidate" or row.identical or value is None or value.mean is None:
            return math.inf
        return -math.inf if math.isnan(value.mean) else value.mean

    return min(range(len(rows)), key=closeness, default=0)


def _made(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    """How the pictures were made, as (what, text)."""
    gates = [_gate_text(name, limit) for name, limit in comparison.gates.items()]
    width, height = comparison.size
    rows = (
        ("Reference", f"{comparison.reference}, {size_text(comparison.reference_nbytes)}"),
        ("Model", f"{comparison.architecture} {comparison.variant}".strip()),
        ("What differs", comparison.part),
        ("Prompts", "\n".join(comparison.prompts)),
        ("Seeds", ", ".join(str(seed) for seed in comparison.seeds)),
        ("Steps", str(comparison.steps)),
        ("Sampler", comparison.sampler),
        ("Guidance", "" if comparison.cfg is None else f"{comparison.cfg:g}"),
        ("Picture size", f"{width}×{height}"),
        ("Drawn by", comparison.engine),
        ("Computed on", f"{comparison.device}, {comparison.dtype}"),
        ("Gates", ", ".join(gates) or "none"),
        ("Stands for missing parts", comparison.synthetic),
        ("Measured by", comparison.tool),
    )
    return tuple((what, text) for what, text in rows if text)


def _gate_text(name: str, limit: float) -> str:
    """A gate in words: "PSNR at least 25 dB"."""
    if name not in METRICS:
        return f"{name.replace('_', ' ')} at most {limit:g}"
    what = METRICS[name]
    side = "least" if what.better == "up" else "most"
    return f"{what.title} at {side} {limit:g} {what.unit}".rstrip()
