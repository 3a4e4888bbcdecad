"""What commands that merge LoRAs share: options, their values, and the rendering of a report."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from diffquant.cli.frame import echo, table
from diffquant.cli.values import lora_pairs
from diffquant.convert.lora.merge import LoraInput
from diffquant.convert.lora.merge_report import LoraRow, MergeReport

__all__ = ["lora_options", "loras_from", "render_merge"]

_SHOWN = 3


def lora_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --lora, --te-scale and --allow-missing to a command that writes a checkpoint."""
    merged = click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="FILE[:WEIGHT]",
        help="Merge a LoRA or another adapter into the weights first; repeatable.",
    )
    return merged(te_options(function))


def te_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --te-scale and --allow-missing."""
    scale = click.option(
        "--te-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="Multiply LoRA weights by X in text encoders.",
    )
    missing = click.option(
        "--allow-missing",
        is_flag=True,
        help="Leave out LoRA layers that do not fit, and say which.",
    )
    return scale(missing(function))


def loras_from(texts: tuple[str, ...], te_scale: float) -> tuple[LoraInput, ...]:
    """Read FILE or FILE:WEIGHT.

    Raises:
        UsageError: the weight is not a number.
    """
    return tuple(LoraInput(path, weight, weight * te_scale) for path, weight in lora_pairs(texts))


def render_merge(report: MergeReport, *, verbose: bool = False) -> None:
    """Print what became of every file; with `verbose` every weight."""
    for row in report.loras:
        _render_file(row)
    if report.survival is not None:
        known = sum(one.survival is not None for one in report.layers)
        echo(
            f"  {known} packed weights were rounded again: {report.survival:.0%} of what was "
            "merged outlives it (median)"
        )
    if verbose and report.layers:
        echo()
        table(
            ("merged into", "change", "survives"),
            [
                (
                    f"{one.part} {one.key}",
                    "-" if one.change is None else f"{one.change:.2%}",
                    "-" if one.survival is None else f"{one.survival:.0%}",
                )
                for one in report.layers
            ],
            right=(1, 2),
        )


def _render_file(row: LoraRow) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.kinds.items())
    strength = f"{row.weight:g}"
    if row.encoder_weight != row.weight:
        strength += f", text encoders {row.encoder_weight:g}"
    echo(f"  merged {Path(row.path).name} at {strength}: {row.written} layers ({kinds})")
    if row.largest:
        size = f"{row.largest:.2%} of" if math.isfinite(row.largest) else "of all that is zero in"
        echo(f"    largest change: {size} {row.largest_key}")
    for layer, reason in row.skipped[:_SHOWN]:
        echo(f"    left out: {layer}: {reason}")
    if len(row.skipped) > _SHOWN:
        echo(f"    and {len(row.skipped) - _SHOWN} more; --json lists all")
    if row.recipe:
        echo(f"    {row.recipe}")
