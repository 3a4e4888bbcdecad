"""`diffquant lora merge BASE LORA[:WEIGHT]... -o OUT [-t TYPE]`."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, run, threads
from diffquant.cli.job import render_job, resumable
from diffquant.cli.merging import loras_from, te_options
from diffquant.convert.job_report import JobReport
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.merge import merging
from diffquant.convert.plan import Request
from diffquant.quant.types import type_named

__all__ = ["command"]


@click.command("merge")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("loras", nargs=-1, required=True, metavar="LORA[:WEIGHT]...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="File or folder to write.",
)
@click.option("-t", "--type", "type_name", help="Quantize too; see `diffquant formats`.")
@click.option(
    "--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Cast floating point tensors."
)
@te_options
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Merge into weights that are packed already, and say how much outlives the rounding.",
)
@click.option("--arch", default="", metavar="NAME", help="Take BASE for this architecture.")
@click.option(
    "--configs", type=click.Path(path_type=Path), metavar="FOLDER", help="Folder of configs."
)
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@resumable
@threads
@common
def command(
    base: Path,
    loras: tuple[str, ...],
    output: Path,
    type_name: str | None,
    dtype: str | None,
    te_scale: float,
    allow_missing: bool,
    allow_requantize: bool,
    arch: str,
    configs: Path | None,
    dry_run: bool,
    force: bool,
    resume: bool,
    options: Options,
) -> None:
    """Write BASE with LoRAs merged into it, in float32, one after the other.

    Takes LoRA, LoCon, DoRA, LoHa, LoKr, GLoRA, OFT, BOFT, IA3, full differences and norms, in any
    naming. Without -t and --dtype every weight keeps the precision it has.
    """
    if type_name and dtype:
        raise click.UsageError("-t quantizes and --dtype casts: give one of them")

    def work() -> Outcome:
        request = Request(
            container=container_for(output),
            type=type_named(type_name) if type_name else None,
            dtype=dtype,
            allow_requantize=allow_requantize,
            arch=arch,
        )
        given = loras_from(loras, te_scale)
        with merging(base, given, arch=arch, allow_missing=allow_missing) as merge:
            report = run_job(
                base,
                output,
                merge.into(request),
                base=configs,
                force=force,
                dry_run=dry_run,
                workers=options.threads,
                resume=resume,
                progress=options.bar(),
                beside=merge.paths,
            )
            report = merge.told(report)
        failed = report.verdict == "fail"
        return Outcome(report, report.warnings, 3 if failed else 0, ok=not failed)

    def render(report: JobReport) -> None:
        render_job(report, verbose=options.verbose > 0)

    run("lora merge", options, work, render)
