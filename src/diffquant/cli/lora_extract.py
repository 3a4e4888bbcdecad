"""`diffquant lora extract TUNED BASE -o OUT`: what a fine-tune changed, as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffquant.cli.frame import Options, Outcome, common, echo, human, run, table
from diffquant.cli.values import check_device
from diffquant.convert.lora.extraction import ExtractReport, extract_lora
from diffquant.convert.lora.ranks import keep_of
from diffquant.convert.lora.spelling import SPELLINGS

__all__ = ["command"]

_LISTED = 5


@click.command("extract")
@click.argument("tuned", type=click.Path(path_type=Path))
@click.argument("base", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="LoRA to write."
)
@click.option("--rank", type=click.IntRange(min=1), help="Rank, or the highest beside a measure.")
@click.option("--conv-rank", type=click.IntRange(min=1), help="The same for kernels above 1x1.")
@click.option("--energy", type=float, help="Keep this share of each difference's squared size.")
@click.option("--sv-fro", type=float, help="Keep this share of each difference's size.")
@click.option("--sv-ratio", type=float, help="Keep singular values within this ratio of the first.")
@click.option(
    "--to", type=click.Choice(list(SPELLINGS)), default="kohya", show_default=True, help="Names."
)
@click.option(
    "--dtype", type=click.Choice(["f32", "f16", "bf16"]), default="f16", show_default=True
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where factors are found: cpu, cuda or mps."
)
@click.option("--dry-run", is_flag=True, help="Say what would be kept, write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@common
def command(
    tuned: Path,
    base: Path,
    output: Path,
    rank: int | None,
    conv_rank: int | None,
    energy: float | None,
    sv_fro: float | None,
    sv_ratio: float | None,
    to: str,
    dtype: str,
    device: str,
    dry_run: bool,
    force: bool,
    options: Options,
) -> None:
    """Write the difference TUNED - BASE as a LoRA for BASE, by singular values.

    The two may have different layouts, containers and dtypes. Denoiser, and text encoders where
    both have them. -v lists every layer.
    """

    def work() -> Outcome:
        measures = {"energy": energy, "sv_fro": sv_fro, "sv_ratio": sv_ratio}
        more: dict[str, Any] = {}
        if device != "cpu":
            check_device(device)
            from diffquant.runtime.factors import factors_on

            more["factors"] = factors_on(device)
        report = extract_lora(
            tuned,
            base,
            output,
            keep_of(rank, measures, conv_rank=conv_rank),
            to=to,
            dtype=dtype,
            force=force,
            dry_run=dry_run,
            progress=options.bar(),
            **more,
        )
        return Outcome(report)

    def render(report: ExtractReport) -> None:
        _render(report, verbose=options.verbose > 0)

    run("lora extract", options, work, render)


def _render(report: ExtractReport, *, verbose: bool) -> None:
    verb = "would write" if report.dry_run else "wrote"
    echo(f"{verb} {report.output}, {human(report.nbytes)}")
    same = f", {report.same} weights are the same" if report.same else ""
    names = SPELLINGS[report.to].title
    echo(f"  {report.architecture}, {names} names: {len(report.layers)} layers{same}")
    ranks = [f"{rank} ({count})" for rank, count in report.ranks.items()]
    more = f" and {len(ranks) - 6} more" if len(ranks) > 6 else ""
    echo(f"  rank (layers): {', '.join(ranks[:6])}{more}")
    echo(f"  keeps {report.kept:.2%} of the squared difference")
    for note in report.notes:
        echo(f"  {note}")
    for name, why in report.left_out[:_LISTED]:
        echo(f"  not in it: {name:.100}: {why}")
    if len(report.left_out) > _LISTED:
        echo(f"  and {len(report.left_out) - _LISTED} more are not in it")
    rows = report.layers if verbose else sorted(report.layers, key=lambda one: one.kept)[:_LISTED]
    shown = [one for one in rows if verbose or one.kept < 1 - 1e-6]
    if shown:
        table(
            ("layer" if verbose else "least kept", "rank", "change", "kept"),
            [
                (
                    f"{one.part}: {one.module:.90}",
                    str(one.rank),
                    f"{one.norm:.4g}",
                    f"{one.kept:.2%}",
                )
                for one in shown
            ],
            right=(1, 2, 3),
        )
