"""Rendering of a comparison: quality in one table, cost in another, both within 100 columns."""

from __future__ import annotations

import shutil

from diffquant.cli.frame import echo, human, table
from diffquant.cli.screen import clip, count, wrap
from diffquant.core.shown import shown
from diffquant.publish.compare_tables import cell, spread
from diffquant.runtime.comparison import METRICS, Comparison, Row

__all__ = ["render_comparison_tables"]

_WIDEST, _LEAST = 100, 80
_SHORTEST_NAME = 12
_WORST = 5
_SHORT = {"prompt": "prompt", "clip": "CLIP", "psnr": "PSNR dB"}


def render_comparison_tables(comparison: Comparison, *, verbose: bool) -> None:
    """Print what was compared, both tables, what is missing, and every problem."""
    _render_head(comparison)
    _render_quality(comparison)
    echo()
    _render_cost(comparison)
    notes = [f"{METRICS[name].title} is missing: {why}" for name, why in comparison.missing.items()]
    notes += [shown(f"{row.name}: {text}") for row in comparison.rows for text in row.problems]
    if notes:
        echo()
    for note in notes:
        for line in wrap(note):
            echo(line)
    if verbose:
        _render_layers(comparison)


def _render_head(comparison: Comparison) -> None:
    name = comparison.architecture + (f" {comparison.variant}" if comparison.variant else "")
    echo(f"reference {shown(comparison.reference)}: {name}, {human(comparison.reference_nbytes)}")
    own = [
        f"{METRICS[metric].title} {value.mean:.3f}"
        for metric, value in comparison.reference_values.items()
        if value.mean is not None
    ]
    if comparison.reference_seconds is not None:
        own.append(f"{comparison.reference_seconds:.2f} s per picture")
    if comparison.reference_peak_mib is not None:
        own.append(f"peak {comparison.reference_peak_mib:.0f} MiB")
    if own:
        echo(f"  {', '.join(own)}")
    size = "x".join(map(str, comparison.size))
    cfg = "" if comparison.cfg is None else f", cfg {comparison.cfg:g}"
    pairs = f"{count(len(comparison.prompts), 'prompt')} x {count(len(comparison.seeds), 'seed')}"
    echo(f"  {comparison.part} differs; {pairs}, {comparison.steps} steps{cfg}, {size}")
    echo(f"  {comparison.engine}, {comparison.device}, {comparison.dtype}")
    if comparison.synthetic:
        for line in wrap(comparison.synthetic):
            echo(line)
    echo()


def _render_quality(comparison: Comparison) -> None:
    """Two lines a row: the values, and under them half the width of their intervals."""
    heads = [_SHORT.get(metric, METRICS[metric].title) for metric in comparison.metrics]
    lines: list[tuple[str, ...]] = []
    for row in comparison.rows:
        cells = [cell(comparison, row, metric) for metric in comparison.metrics]
        lines.append((row.name, *cells, row.verdict or "-"))
        under = [spread(row, metric) for metric in comparison.metrics]
        if any(under):
            lines.append(("", *under, ""))
    rest = [*heads, "verdict"]
    taken = sum(
        max(len(head), *(len(line[index]) for line in lines)) + 2
        for index, head in enumerate(rest, 1)
    )
    columns = shutil.get_terminal_size((_WIDEST, 24)).columns
    name = max(min(max(columns, _LEAST), _WIDEST) - taken, _SHORTEST_NAME)
    table(
        ("file", *rest),
        [(clip(shown(line[0]), name), *line[1:]) for line in lines],
        right=range(1, len(rest)),
    )
    if any(spread(row, metric) for row in comparison.rows for metric in comparison.metrics):
        echo("±: half of the 95 % interval over pairs")


def _render_cost(comparison: Comparison) -> None:
    table(
        ("file", "type", "size", "bits/w", "weights", "latents", "s/picture", "peak MiB"),
        [_cost(row) for row in comparison.rows],
        right=range(2, 8),
    )
    echo("weights, latents: relative error; latents are a diagnosis and judge nothing")


def _cost(row: Row) -> tuple[str, ...]:
    return (
        clip(shown(row.name), 34),
        clip(shown(row.type), 14) or "-",
        "-" if row.nbytes is None else human(row.nbytes),
        _number(row.bits_per_weight, 2),
        _number(row.weight_error, 4),
        _number(row.latent_error, 4),
        _number(row.seconds, 2),
        _number(row.peak_mib, 0),
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _render_layers(comparison: Comparison) -> None:
    for row in comparison.candidates:
        worst = sorted(row.layers, key=lambda layer: -layer.error)[:_WORST]
        echo()
        echo(shown(f"{row.name}: {row.stored}"))
        lines = [
            (
                clip(shown(one.key), 44),
                one.part,
                one.stored,
                human(one.nbytes),
                f"{one.error:.4f}",
            )
            for one in worst
        ]
        table(("weight furthest off", "part", "stored", "size", "error"), lines, right=(3, 4))
