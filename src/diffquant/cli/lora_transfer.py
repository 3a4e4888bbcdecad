"""`diffquant lora transfer TUNED BASE TARGET -o OUT`: a fine-tune's difference on another model."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, run, threads
from diffquant.cli.job import render_job
from diffquant.convert.job_report import JobReport
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request
from diffquant.convert.transfer import Transfer
from diffquant.quant.types import type_named

__all__ = ["command"]


@click.command("transfer")
@click.argument("tuned", type=click.Path(path_type=Path))
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="File or folder."
)
@click.option(
    "--weight", type=float, default=1.0, show_default=True, help="How much of the difference."
)
@click.option("-t", "--type", "type_", metavar="TYPE", help="Quantize the result in the same pass.")
@click.option(
    "--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Cast (default: TARGET's)."
)
@click.option("--part", "parts", multiple=True, metavar="NAME", help="Write only this part.")
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@threads
@common
def command(
    tuned: Path,
    base: Path,
    target: Path,
    output: Path,
    weight: float,
    type_: str | None,
    dtype: str | None,
    parts: tuple[str, ...],
    dry_run: bool,
    force: bool,
    options: Options,
) -> None:
    """Write TARGET + weight * (TUNED - BASE): a fine-tune moved to another model of its family.

    The three may differ in layout, container and dtype. Tensors that they do not share stay as
    TARGET has them, so that an inpainting or distilled model can take up a style.
    """
    if type_ is not None and dtype is not None:
        raise click.UsageError("give --type or --dtype, not both")

    def work() -> Outcome:
        request = Request(
            container=container_for(output),
            type=type_named(type_) if type_ else None,
            dtype=dtype,
            parts=parts,
            transfer=Transfer(tuned, base, weight),
            pairs={"diffquant.transfer": f"{weight:g} x ({tuned.name} - {base.name})"},
        )
        report = run_job(
            target,
            output,
            request,
            force=force,
            dry_run=dry_run,
            workers=options.threads,
            progress=options.bar(),
        )
        return Outcome(report, report.warnings)

    def render(report: JobReport) -> None:
        render_job(report, verbose=options.verbose > 0)

    run("lora transfer", options, work, render)
