"""`diffquant lora merge BASE LORA[:WEIGHT]... -o OUT [-t TYPE]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffquant.cli.frame import Options, Outcome, common, run, threads
from diffquant.cli.job import JobOutcome, render_job, resumable
from diffquant.cli.merging import loras_from, render_merge, te_options
from diffquant.cli.outputs import PLACE, check_several, folder_made, named_outputs, types_from
from diffquant.cli.view_several import SeveralOutcome, render_several
from diffquant.convert.job_report import JobReport
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.merge import merging
from diffquant.convert.plan import Request
from diffquant.convert.several import Wanted, run_jobs
from diffquant.quant.types import QuantType

__all__ = ["command"]


@click.command("merge")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("loras", nargs=-1, required=True, metavar="LORA[:WEIGHT]...")
@click.option(
    "-o",
    "--output",
    required=True,
    help="File or folder to write; with several types a folder, or a name with {type}.",
)
@click.option(
    "-t",
    "--type",
    "type_names",
    multiple=True,
    metavar="TYPE",
    help="Quantize too (see `diffquant formats`); several times for several outputs in one pass.",
)
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
    output: str,
    type_names: tuple[str, ...],
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
    if type_names and dtype:
        raise click.UsageError("-t quantizes and --dtype casts: give one of them")

    def work() -> Outcome:
        kinds: tuple[QuantType | None, ...] = types_from(type_names, ()) or (None,)
        several = len(kinds) > 1
        if several:
            check_several(resume=resume)
        named = [one for one in kinds if one is not None]
        placed = several or PLACE in output
        paths = named_outputs(output, base.stem, named) if placed and named else (Path(output),)
        given = loras_from(loras, te_scale)
        common: dict[str, Any] = {
            "base": configs,
            "force": force,
            "dry_run": dry_run,
            "workers": options.threads,
            "progress": options.bar(),
        }
        with merging(base, given, arch=arch, allow_missing=allow_missing) as merge:
            common["beside"] = merge.paths
            requests = [
                merge.into(
                    Request(
                        container=container_for(path),
                        type=kind,
                        dtype=dtype,
                        allow_requantize=allow_requantize,
                        arch=arch,
                    )
                )
                for path, kind in zip(paths, kinds, strict=True)
            ]
            if several:
                wanted = [Wanted(path, one) for path, one in zip(paths, requests, strict=True)]
                with folder_made(output, dry_run=dry_run):
                    run_of = merge.told_each(run_jobs(base, wanted, **common))
                jobs = run_of.outputs
                result: object = SeveralOutcome(run_of, tuple(JobOutcome(one) for one in jobs))
                warnings = run_of.warnings
            else:
                report = run_job(base, paths[0], requests[0], resume=resume, **common)
                report = merge.told(report)
                jobs, result, warnings = (report,), report, report.warnings
        failed = any(one.verdict == "fail" for one in jobs)
        return Outcome(result, warnings, 3 if failed else 0, ok=not failed)

    def render(result: JobReport | SeveralOutcome) -> None:
        if isinstance(result, SeveralOutcome):
            render_several(result, verbose=options.verbose > 0)
            merged = result.report.outputs[0].merged
            if merged is not None:
                render_merge(merged, verbose=options.verbose > 0)
            return
        render_job(result, verbose=options.verbose > 0)

    run("lora merge", options, work, render)
