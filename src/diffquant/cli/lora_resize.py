"""`diffquant lora resize IN OUT --rank N`: the same LoRA at a lower rank."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, echo, human, run, table
from diffquant.convert.lora.ranks import keep_of
from diffquant.convert.lora.resizing import ResizeReport, resize_lora

__all__ = ["command"]

_WORST = 5


@click.command("resize")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--rank", type=click.IntRange(min=1), help="Rank, or the highest beside a measure.")
@click.option("--conv-rank", type=click.IntRange(min=1), help="The same for kernels above 1x1.")
@click.option("--energy", type=float, help="Keep this share of each layer's squared size.")
@click.option("--sv-fro", type=float, help="Keep this share of each layer's size (sd-scripts).")
@click.option("--sv-cumulative", type=float, help="Keep this share of the singular values' sum.")
@click.option("--sv-ratio", type=float, help="Keep singular values within this ratio of the first.")
@click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Cast the factors.")
@click.option("--dry-run", is_flag=True, help="Say what would be kept, write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@common
def command(
    source: Path,
    output: Path,
    rank: int | None,
    conv_rank: int | None,
    energy: float | None,
    sv_fro: float | None,
    sv_cumulative: float | None,
    sv_ratio: float | None,
    dtype: str | None,
    dry_run: bool,
    force: bool,
    options: Options,
) -> None:
    """Write SOURCE at a lower rank: of each layer the nearest there is, by its singular values.

    LoRA and LoCon; names stay as they are. -v lists every layer.
    """

    def work() -> Outcome:
        measures = {
            "energy": energy,
            "sv_fro": sv_fro,
            "sv_cumulative": sv_cumulative,
            "sv_ratio": sv_ratio,
        }
        report = resize_lora(
            source,
            output,
            keep_of(rank, measures, conv_rank=conv_rank),
            dtype=dtype,
            force=force,
            dry_run=dry_run,
            progress=options.bar(),
        )
        return Outcome(report)

    def render(report: ResizeReport) -> None:
        _render(report, verbose=options.verbose > 0)

    run("lora resize", options, work, render)


def _render(report: ResizeReport, *, verbose: bool) -> None:
    verb = "would write" if report.dry_run else "wrote"
    echo(f"{verb} {report.output}, {human(report.nbytes)} of {human(report.before_nbytes)}")
    ranks = [f"{rank} ({count})" for rank, count in report.ranks.items()]
    more = f" and {len(ranks) - 6} more" if len(ranks) > 6 else ""
    echo(f"  rank (layers): {', '.join(ranks[:6])}{more}")
    echo(
        f"  keeps {report.kept:.2%} of the squared size of the deltas, {report.worst:.2%} at worst"
    )
    rows = report.layers if verbose else sorted(report.layers, key=lambda one: one.kept)[:_WORST]
    shown = [one for one in rows if verbose or one.kept < 1 - 1e-6]
    if shown:
        table(
            ("layer" if verbose else "least kept", "before", "rank", "kept"),
            [
                (f"{one.name:.90}", str(one.before), str(one.rank), f"{one.kept:.2%}")
                for one in shown
            ],
            right=(1, 2, 3),
        )
