"""`diffquant verify OUT --against SRC`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from diffquant.cli.ask_gates import gate_options
from diffquant.cli.ask_sides import Sides, side_options
from diffquant.cli.frame import Options, Outcome, common, run
from diffquant.cli.values import device_from, fell_back, lora_pairs
from diffquant.cli.verdict import render_verify, strip_pictures
from diffquant.core.errors import UsageError
from diffquant.runtime.gates import check_limits

if TYPE_CHECKING:
    from diffquant.runtime.compute import Mode

__all__ = ["command"]

_MIN_PSNR_DB = 25.0  # the gate where none is given


@click.command("verify")
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--against", required=True, type=click.Path(path_type=Path), help="The source it was made from."
)
@click.option(
    "--level", type=click.Choice(["load", "tensors", "image"]), default="image", show_default=True
)
@side_options
@click.option(
    "--min-psnr", type=float, metavar="DB", help=f"PSNR over all pairs.  [default: {_MIN_PSNR_DB}]"
)
@gate_options("min_psnr")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE:WEIGHT",
    help="LoRA on CANDIDATE's side alone, such as its error LoRA; counts in pictures.",
)
@click.option(
    "--compute",
    type=click.Choice(["auto", "exact", "fp8", "int8"]),
    default="exact",
    show_default=True,
    help="What CANDIDATE's denoiser multiplies in, on a GPU; the source is computed exactly.",
)
@common
def command(
    candidate: Path,
    against: Path,
    level: str,
    sides: Sides,
    min_psnr: float | None,
    limits: dict[str, float],
    loras: tuple[str, ...],
    compute: str,
    options: Options,
) -> None:
    """Judge CANDIDATE against its source: it loads, its weights agree, its pictures agree.

    Exit code 3 when a gate fails. Every gate must also refuse a damaged copy: one that does not
    fails as a gate that cannot fail, and one whose metric cannot be computed fails too.
    """

    def work() -> Outcome:
        if loras and level != "image":
            raise UsageError("--lora counts in pictures alone: use --level image")
        if sides.synthetic and level != "image":
            raise UsageError("--synthetic draws pictures: use --level image")
        if sides.engine != "bundled" and level != "image":
            raise UsageError("--engine draws pictures: use --level image")
        if compute != "exact" and (level != "image" or sides.engine != "bundled"):
            raise UsageError("--compute draws pictures in the bundled engine: use --level image")
        if sides.asks_memory and level != "image":
            raise UsageError("--vram, --ram, --offload and --decode are of pictures")
        if min_psnr is not None and level != "image":
            raise UsageError("--min-psnr judges pictures: use --level image")
        psnr = _MIN_PSNR_DB if min_psnr is None else min_psnr
        check_limits({"min_psnr": psnr, **limits})
        max_rel_error = limits.pop("max_rel_error", None)
        if limits and level != "image":
            flag = f"--{next(iter(limits)).replace('_', '-')}"
            raise UsageError(f"{flag} judges pictures: use --level image")
        lines, shared = sides.lines(), sides.settings()
        on = device_from(sides.device, sides.engine) if level == "image" else None
        from diffquant.runtime.compare import DEFAULT_PROMPTS, ImageSettings
        from diffquant.runtime.verify import verify

        settings = ImageSettings(
            prompts=lines or DEFAULT_PROMPTS,
            min_psnr=psnr,
            loras=lora_pairs(loras),
            limits=limits,
            compute=cast("Mode", compute),
            device=on.name if on else "cpu",
            **shared,
        )
        report = verify(
            candidate,
            against,
            level=level,
            settings=settings,
            base=sides.base,
            vae=sides.vae,
            progress=options.bar(),
            max_rel_error=max_rel_error,
        )
        failed = report.verdict == "fail"
        result = {
            **strip_pictures(report),
            "device": on.name if on and report.image else "",
            "device_why": on.why if on and report.image else "",
        }
        warnings = (*(fell_back(on) if on else ()), *report.warnings)
        return Outcome(result, warnings, 3 if failed else 0, ok=not failed)

    run("verify", options, work, render_verify)
