"""`diffquant convert SRC OUT`: dtype, parts, folder and single file, without quantizing."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, run, threads
from diffquant.cli.job import render_job, resumable
from diffquant.convert.job_report import JobReport
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request

__all__ = ["command"]


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path), required=False, metavar="[OUTPUT]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File or folder to write.")
@click.option(
    "--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Cast floating point tensors."
)
@click.option(
    "--arch",
    default="",
    metavar="NAME",
    help="Take the source for this architecture; `generic` keeps all names as they are.",
)
@click.option("--part", "parts", multiple=True, metavar="NAME", help="Write only this part.")
@click.option("--base", type=click.Path(path_type=Path), help="Folder to take configs from.")
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@resumable
@threads
@common
def command(
    source: Path,
    target: Path | None,
    output: Path | None,
    dtype: str | None,
    arch: str,
    parts: tuple[str, ...],
    base: Path | None,
    dry_run: bool,
    force: bool,
    resume: bool,
    options: Options,
) -> None:
    """Convert SOURCE between a single file and a Diffusers folder, extract parts, change dtype.

    Without --dtype every tensor keeps its bytes. Quantized weights stay packed where they can.
    """
    if (target is None) == (output is None):
        raise click.UsageError("give one file or folder to write: as OUTPUT, or with -o")
    written = output or target
    assert written is not None

    def work() -> Outcome:
        request = Request(container=container_for(written), dtype=dtype, parts=parts, arch=arch)
        report = run_job(
            source,
            written,
            request,
            base=base,
            force=force,
            dry_run=dry_run,
            workers=options.threads,
            resume=resume,
            progress=options.bar(),
        )
        return Outcome(report, report.warnings)

    def render(report: JobReport) -> None:
        render_job(report, verbose=options.verbose > 0)

    run("convert", options, work, render)
