"""`diffquant lora check LORA [BASE]`: whether a LoRA fits a model, and what to do if not."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, run
from diffquant.cli.view_lora_check import render_lora_check
from diffquant.inspect.lora_check import LoraCheck, check_lora
from diffquant.inspect.subject import open_subject

__all__ = ["command"]


@click.command("check")
@click.argument("lora", type=click.Path(path_type=Path))
@click.argument("base", type=click.Path(path_type=Path), required=False)
@click.option("--strength", is_flag=True, help="Read the values: how much each block is changed.")
@common
def command(lora: Path, base: Path | None, strength: bool, options: Options) -> None:
    """Say which layers of LORA fit BASE, and what to do about those that do not.

    Without BASE, the published model that LORA seems made for stands in. Exit code 3 when it fits
    in part or not at all, 1 when a layer is malformed.
    """

    def work() -> Outcome:
        with open_subject(lora) as one:
            if base is None:
                report = check_lora(one, strength=strength)
            else:
                with open_subject(base) as model:
                    report = check_lora(one, model, strength=strength)
        fits = report.verdict == "applies"
        return Outcome(report, exit_code=0 if fits else 3, ok=fits)

    def render(report: LoraCheck) -> None:
        render_lora_check(report, verbose=options.verbose > 0)

    run("lora check", options, work, render)
