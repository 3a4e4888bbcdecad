"""Render a LoraCheck: the verdict first, then what to do, then the layers it rests on."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from diffquant.cli.frame import echo, table
from diffquant.inspect.lora_check import BlockStrength, LayerCheck, LoraCheck

__all__ = ["render_lora_check"]

_LISTED = 8
_BAR = 30
_VERDICTS = {"applies": "applies", "partly": "applies in part", "nothing": "does not apply"}


def render_lora_check(report: LoraCheck, *, verbose: bool) -> None:
    """Print whether a LoRA fits; every layer with `verbose`."""
    against = report.base or f"the published {report.model}"
    echo(f"{report.lora} on {against}")
    echo(f"  {_VERDICTS[report.verdict]}: {report.summary}")
    for text in report.remedies:
        _wrapped("do", text)
    for text in report.notes:
        _wrapped("note", text)
    echo()
    table(
        ("part", "layers", "fit", "blocks"),
        [
            (one.name or "unknown", str(one.layers), str(one.matched), _short(one.blocks))
            for one in report.parts
        ],
        right=(1, 2),
    )
    lost = [one for one in report.layers if one.verdict != "matched"]
    shown = report.layers if verbose else lost[:_LISTED]
    if shown:
        echo()
        _layers(shown, verbose=verbose)
    if not verbose and len(lost) > _LISTED:
        echo(f"  and {len(lost) - _LISTED} more (-v shows every layer)")
    if report.strengths:
        echo()
        _bars(report.strengths)
    if report.unmeasured:
        echo(f"  {report.unmeasured} layers have no size without the weight they change")


def _wrapped(label: str, text: str) -> None:
    width = shutil.get_terminal_size().columns
    lines = textwrap.wrap(text, max(width - 8, 40))
    for index, line in enumerate(lines):
        echo(f"  {label if index == 0 else '':<5} {line}")


def _short(blocks: Sequence[str]) -> str:
    return ", ".join(blocks[:3]) + (" ..." if len(blocks) > 3 else "")


def _layers(layers: Sequence[LayerCheck], *, verbose: bool) -> None:
    for one in layers:
        if one.verdict == "matched":
            size = f", change {one.strength:.4g}" if one.strength is not None else ""
            echo(f"  {one.name:.100} -> {one.module}{size}")
        else:
            kind = "shape" if one.verdict == "shape_mismatch" else "lost"
            echo(f"  {kind:<6}{one.name:.100}")
            echo(f"        {one.reason}")
    if verbose:
        echo(f"  {len(layers)} layers")


def _bars(strengths: Sequence[BlockStrength]) -> None:
    most = max(one.norm for one in strengths)
    rows = [
        (
            one.block,
            str(one.layers),
            f"{one.norm:.4g}",
            "#" * round(_BAR * one.norm / most) if most else "",
        )
        for one in strengths
    ]
    table(("block", "layers", "change", ""), rows, right=(1, 2))
