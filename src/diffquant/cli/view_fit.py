"""The fit of a file, on a screen: the verdict, a bar per part at work, levels, smaller types."""

from __future__ import annotations

import itertools

from diffquant.cli.frame import echo, human, table
from diffquant.cli.screen import BAD, DIM, GOOD, TITLE, Tone, clip, styled, unicode, width, wrap
from diffquant.inspect.fit import FitReport, FitStage

__all__ = ["render_fit"]

_LONGEST_TITLE = 30
_SIZE_COLUMNS = 11
_STAGE_COLUMNS = 8
# What a bar is made of: weights, activations, decoding one packed weight.
_BLOCKS, _ASCII = ("█", "▒", "░"), ("#", "=", "-")
_TONES: tuple[Tone, ...] = ({"fg": "cyan"}, {"fg": "cyan"}, {"fg": "cyan"})
_LEVELS = {
    "none": "every part stays on the device",
    "model": "one part on the device at a time",
    "blocks": "blocks streamed",
    "sequential": "layers streamed",
}


def render_fit(report: FitReport, *, explain: bool = False) -> None:
    """Print a report; `explain` adds how each number came about."""
    styled((report.path, TITLE))
    if report.reason:
        for line in wrap(f"fit unknown: {report.reason}"):
            echo(line)
        return
    _verdict(report)
    guided = ", guidance" if report.guided else ""
    name = f"{report.architecture} {report.variant}".strip()
    batch = f", batch {report.batch}" if report.batch > 1 else ""
    size = f"{report.width}x{report.height}{batch}{guided}, computing in {report.compute.lower()}"
    styled((f"  {name}, {size}", DIM))
    echo()
    _bars(report)
    echo()
    _levels(report)
    if report.advice:
        echo()
        _smaller(report)
    if report.notes:
        echo()
    for note in report.notes:
        for line in wrap(f"note: {note}"):
            styled((line, DIM))
    if explain:
        _explain(report)


def _verdict(report: FitReport) -> None:
    if report.vram_nbytes is None:
        first, last = report.levels[0], min(report.levels, key=lambda one: one.nbytes)
        told = f"needs {human(first.nbytes)} with every part on the device"
        if last is not first:
            told += f", {human(last.nbytes)} at the least"
        styled(f"  {told}")
        return
    budget = human(report.vram_nbytes)
    hit = next((one for one in report.levels if one.fits), None)
    if hit is None:
        least = min(one.nbytes for one in report.levels)
        styled("  ", ("does not fit", BAD), f" in {budget}: {human(least)} at the least")
        return
    how = _LEVELS[hit.level] + (", decoding in strips" if hit.tiled else "")
    total = next((one.blocks for one in report.stages if one.name == "denoise"), 0)
    if hit.blocks is not None and total:
        how += f", {hit.blocks} of {total} can stay"
    styled("  ", ("fits", GOOD), f" in {budget}: {how} ({human(hit.nbytes)} needed)")


def _bars(report: FitReport) -> None:
    """A bar per part at work, to the scale of the largest or of the budget."""
    titles = [one.title + ("" if one.in_file else " *") for one in report.stages]
    longest = min(max(len(title) for title in titles), _LONGEST_TITLE)
    columns = width() - (2 + _STAGE_COLUMNS + longest + 2 + 1 + _SIZE_COLUMNS)
    scale = max(one.peak_nbytes for one in report.stages) or 1
    signs = _BLOCKS if unicode() else _ASCII
    for stage, title in zip(report.stages, titles, strict=True):
        pieces = _pieces(stage, scale, columns)
        blank = columns - sum(pieces)
        styled(
            f"  {stage.name:{_STAGE_COLUMNS}}{clip(title, longest).ljust(longest)}  ",
            *(
                (sign * cells, tone)
                for sign, cells, tone in zip(signs, pieces, _TONES, strict=True)
            ),
            f"{' ' * blank} {human(stage.peak_nbytes):>{_SIZE_COLUMNS}}",
        )
    legend = f"{signs[0]} weights  {signs[1]} activations"
    if any(one.scratch_nbytes for one in report.stages):
        legend += f"  {signs[2]} one weight being decoded"
    styled((f"  {legend}", DIM))
    if not all(one.in_file for one in report.stages):
        styled(("  * not in this file: as it is published, in 16 bits", DIM))


def _pieces(stage: FitStage, scale: int, columns: int) -> list[int]:
    """Cells of each piece of a bar; rounded at its ends, so that the whole is right."""
    parts = (stage.weights_nbytes, stage.activations_nbytes, stage.scratch_nbytes)
    ends = [round(columns * end / scale) for end in itertools.accumulate(parts, initial=0)]
    cells = [after - before for before, after in itertools.pairwise(ends)]
    if not ends[-1]:  # something is there, however little
        cells[parts.index(max(parts))] = 1
    return cells


def _levels(report: FitReport) -> None:
    asked = report.vram_nbytes is not None
    room = width() - 48
    rows = [
        (
            f"  {one.name}",
            human(one.nbytes),
            *(("yes" if one.fits else "no",) if asked else ()),
            clip(one.decided_by, room),
        )
        for one in report.levels
    ]
    table(("  offload", "needs", *(("fits",) if asked else ()), "decided by"), rows, right=(1,))
    styled((f"  each with {human(report.context_nbytes)} for the device's own context", DIM))


def _smaller(report: FitReport) -> None:
    rows = [
        (f"  {one.type}", human(one.nbytes), one.level or "does not fit") for one in report.advice
    ]
    table(("  denoiser as", "size", "offload then"), rows, right=(1,))


def _explain(report: FitReport) -> None:
    echo()
    for stage in report.stages:
        styled(f"  {stage.name} ", (stage.title, TITLE))
        blocks = f" in {stage.blocks} blocks" if stage.blocks else ""
        echo(f"    weights {human(stage.weights_nbytes)}{blocks}, from {stage.source}")
        for told in stage.derivation:
            for line in wrap(told, "    "):
                echo(line)
        if stage.largest_nbytes:
            echo(f"    largest tensor: {stage.largest_label}, {human(stage.largest_nbytes)}")
