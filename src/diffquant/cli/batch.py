"""`diffquant batch PLAN.toml`."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, plain_text, run, threads
from diffquant.cli.values import bytes_from
from diffquant.cli.view_batch import render_batch
from diffquant.publish.batch import run_batch
from diffquant.publish.batch.pool import Ended

__all__ = ["command"]


@click.command("batch")
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes at once, each with its share of the threads (default: one per four cores).",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory for all processes together, such as 16GiB (default: 90 % of what is free).",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Hand the jobs to a Ray cluster (auto, HOST:PORT), or to a `local` one.",
)
@click.option("--fail-fast", is_flag=True, help="Stop at the first job that fails.")
@click.option("--dry-run", is_flag=True, help="Show the jobs and what is done; write nothing.")
@click.option("--force", is_flag=True, help="Make everything again; replace what is there.")
@threads
@common
def command(
    plan: Path,
    jobs: int | None,
    memory: str | None,
    ray: str | None,
    fail_fast: bool,
    dry_run: bool,
    force: bool,
    options: Options,
) -> None:
    """Make the outputs that the file PLAN names: models, types and targets (docs/batch.md).

    What is finished is noted in the output folder. The same command after a crash, Ctrl-C or a
    change of the plan does what is left.
    """

    def told(one: Ended) -> None:
        if options.quiet or options.as_json:
            return
        how = one.message if one.code else f"{one.seconds:.1f} s"
        click.echo(plain_text(f"{one.job.label}: {how}"), err=True)

    def work() -> Outcome:
        report = run_batch(
            plan,
            processes=jobs,
            threads=options.threads,
            memory_nbytes=bytes_from(memory, "--memory") if memory is not None else None,
            dry_run=dry_run,
            force=force,
            fail_fast=fail_fast,
            ray=ray,
            progress=options.bar(),
            ended=told,
        )
        warnings = [f"{row.name}: {text}" for row in report.outputs for text in row.warnings]
        warnings += [
            f"{row.name}: verification failed: do not publish it"
            for row in report.outputs
            if row.verdict == "fail"
        ]
        failed = dict.fromkeys(
            f"{row.name}: {row.message}" for row in report.outputs if row.result == "failed"
        )
        code = report.exit_code
        return Outcome(report, warnings, code, ok=code == 0, errors=tuple(failed))

    run("batch", options, work, render_batch)
