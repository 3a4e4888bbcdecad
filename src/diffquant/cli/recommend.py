"""`diffquant recommend FILE --vram SIZE`: which type to write for a device and a program."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, echo, human, run, table
from diffquant.cli.screen import DIM, TITLE, styled, wrap
from diffquant.cli.values import bytes_from
from diffquant.convert.sensitivity import read_sensitivity
from diffquant.inspect.loaders import LOADERS
from diffquant.inspect.recommend import Recommendation, RecommendReport, recommend
from diffquant.inspect.subject import open_subject

__all__ = ["command"]

_SHOWN = 12
_LONGEST = 150
_GENERATIONS = ("turing", "ampere", "ada", "hopper", "blackwell", "other")


@click.command("recommend")
@click.argument("file", type=click.Path())
@click.option("--vram", required=True, metavar="SIZE", help="Memory of the device: 8GiB.")
@click.option(
    "--for",
    "loader",
    default="",
    metavar="NAME",
    help="Program that has to read the file: " + ", ".join(LOADERS) + ".",
)
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Rank by these predicted errors (`diffquant quantize --sensitivity` takes the same).",
)
@click.option(
    "--card",
    type=click.Choice(_GENERATIONS),
    default="hopper",
    show_default=True,
    help="Generation of the card, for the class of speed; only what was measured is told.",
)
@common
def command(
    file: str, vram: str, loader: str, sensitivity: Path | None, card: str, options: Options
) -> None:
    """Rank the types FILE can be written in for a device, by what was measured.

    Reads the header alone. A type is recommended when the device holds the denoiser while it runs
    and a program reads the file; others are listed with the reason.
    """

    def work() -> Outcome:
        budget = bytes_from(vram, "--vram")
        known = read_sensitivity(sensitivity) if sensitivity is not None else None
        with open_subject(file) as subject:
            report = recommend(subject, vram=budget, loader=loader, card=card, sensitivity=known)
        return Outcome(report)

    def render(report: RecommendReport) -> None:
        _render(report, _mix(report, vram, sensitivity), verbose=options.verbose > 0)

    run("recommend", options, work, render)


def _render(report: RecommendReport, mix: str, *, verbose: bool) -> None:
    styled((report.path, TITLE))
    name = f"{report.architecture} {report.variant}".strip()
    whom = f", for {report.loader}" if report.loader else ""
    echo(
        f"  {name} at {report.width}x{report.height} on {human(report.vram_nbytes)}{whom}; error: "
        f"{report.errors}"
    )
    echo()
    if report.rows:
        _rows(report.rows if verbose else report.rows[:_SHOWN])
        if not verbose and len(report.rows) > _SHOWN:
            echo(f"  and {len(report.rows) - _SHOWN} more; -v lists all")
        best = report.rows[0]
        echo()
        echo(f"  first: {_command(report, best)}")
        echo(f"  {mix}")
    else:
        echo("  no type is recommended")
    _others(report.others, verbose=verbose)
    for note in report.notes:
        for line in wrap(f"note: {note}"):
            styled((line, DIM))


def _mix(report: RecommendReport, vram: str, sensitivity: Path | None) -> str:
    """How a mix is made that ranks by the same errors, or why there is none."""
    if report.no_mix or not report.rows:
        return f"no mix is made for this device: {report.no_mix}"
    words = [report.path, "--vram", vram.strip()]
    if sensitivity is not None:
        words += ["--sensitivity", str(sensitivity)]
    target = _target(report, report.rows[0])
    return f"a mix made for this device: diffquant quantize {shlex.join(words)}{target}"


def _target(report: RecommendReport, best: Recommendation) -> str:
    return f" --target {best.target}" if best.target == report.loader else ""


def _command(report: RecommendReport, best: Recommendation) -> str:
    ending = {"gguf": "OUT.gguf", "safetensors": "OUT.safetensors", "folder": "OUT/"}
    target = _target(report, best)
    path = shlex.quote(report.path)
    return f"diffquant quantize {path} -o {ending[best.container]} -t {best.type}{target}"


def _rows(rows: tuple[Recommendation, ...]) -> None:
    table(
        ("  type", "container", "size", "bits", "error", "peak", "offload", "decoding", "read by"),
        [
            (
                f"  {one.type}",
                one.container,
                human(one.nbytes),
                f"{one.bits_per_weight:.2f}",
                "-" if one.error is None else f"{one.error:.3g}",
                human(one.peak_nbytes),
                _offload(one),
                one.speed if one.resident else f"{one.speed}, streamed",
                _programs(one),
            )
            for one in rows
        ],
        right=(2, 3, 4, 5),
    )
    if any(one.conditional for one in rows):
        styled(("  * on a condition: `diffquant inspect --for NAME OUT` says which", DIM))


def _offload(one: Recommendation) -> str:
    """What has to leave the device; a denoiser that stays may have larger company."""
    if one.resident and not one.level.startswith(("none", "model")):
        return "other parts streamed"
    return one.level


def _programs(one: Recommendation) -> str:
    """Programs that read it; this package reads all that it writes."""
    names = [name for name in one.loaders if name != "diffquant"] or list(one.loaders)
    return ", ".join(f"{name}*" if name in one.conditional else name for name in names)


def _others(others: tuple[Recommendation, ...], *, verbose: bool) -> None:
    if not others:
        return
    echo()
    echo("  not recommended")
    shown = others if verbose else others[:_SHOWN]
    for one in shown:
        told = f"{one.type} ({one.container}): {one.reason}"
        for line in wrap(
            told if verbose else textwrap.shorten(told, _LONGEST, placeholder=" ..."), "    "
        ):
            echo(line)
    if len(shown) < len(others):
        echo(f"    and {len(others) - len(shown)} more; -v lists all")
