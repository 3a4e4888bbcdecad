"""`diffquant verify OUT --against SRC`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from diffquant.cli.frame import Options, Outcome, common, run
from diffquant.cli.values import check_device, lora_pairs, prompts_from, seeds_from, size_from
from diffquant.cli.verdict import render_verify, strip_pictures
from diffquant.core.errors import UsageError

if TYPE_CHECKING:
    from diffquant.runtime.compute import Mode

__all__ = ["command"]


@click.command("verify")
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--against", required=True, type=click.Path(path_type=Path), help="The source it was made from."
)
@click.option(
    "--level", type=click.Choice(["load", "tensors", "image"]), default="image", show_default=True
)
@click.option("--prompts", type=click.Path(path_type=Path), help="File with a prompt per line.")
@click.option("--seeds", default="0,1", show_default=True, help="Seeds, with commas.")
@click.option("--steps", type=click.IntRange(1, 1000), default=12, show_default=True)
@click.option("--cfg", type=float, help="Guidance strength (default: the family's).")
@click.option("--size", metavar="WxH", help="Picture size (default: the model's own).")
@click.option("--min-psnr", type=float, default=25.0, show_default=True, metavar="DB")
@click.option("--base", type=click.Path(path_type=Path), help="Where missing parts come from.")
@click.option("--vae", type=click.Path(path_type=Path), help="VAE file to use on both sides.")
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE:WEIGHT",
    help="LoRA on CANDIDATE's side alone, such as its error LoRA; counts in pictures.",
)
@click.option(
    "--engine",
    type=click.Choice(["bundled", "diffusers", "sdcpp"]),
    default="bundled",
    show_default=True,
    help="Program that draws both sides: the one that will load the file, if it is installed.",
)
@click.option(
    "--compute",
    type=click.Choice(["auto", "exact", "fp8", "int8"]),
    default="exact",
    show_default=True,
    help="What CANDIDATE's denoiser multiplies in, on a GPU; the source is computed exactly.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or mps.")
@common
def command(
    candidate: Path,
    against: Path,
    level: str,
    prompts: Path | None,
    seeds: str,
    steps: int,
    cfg: float | None,
    size: str | None,
    min_psnr: float,
    base: Path | None,
    vae: Path | None,
    loras: tuple[str, ...],
    engine: str,
    compute: str,
    device: str,
    options: Options,
) -> None:
    """Judge CANDIDATE against its source: it loads, its weights agree, its pictures agree.

    Exit code 3 when a gate fails. The image level also runs a damaged copy that must fail.
    """

    def work() -> Outcome:
        if loras and level != "image":
            raise UsageError("--lora counts in pictures alone: use --level image")
        if engine != "bundled" and level != "image":
            raise UsageError("--engine draws pictures: use --level image")
        if compute != "exact" and (level != "image" or engine != "bundled"):
            raise UsageError("--compute draws pictures in the bundled engine: use --level image")
        picked = seeds_from(seeds)
        lines = prompts_from(prompts) if prompts else None
        wanted = size_from(size)
        if level == "image":
            check_device(device)
        from diffquant.runtime.compare import DEFAULT_PROMPTS, ImageSettings
        from diffquant.runtime.verify import verify

        settings = ImageSettings(
            prompts=lines or DEFAULT_PROMPTS,
            seeds=picked,
            steps=steps,
            cfg=cfg,
            size=wanted,
            min_psnr=min_psnr,
            device=device,
            loras=lora_pairs(loras),
            engine=engine,
            compute=cast("Mode", compute),
        )
        report = verify(
            candidate,
            against,
            level=level,
            settings=settings,
            base=base,
            vae=vae,
            progress=options.bar(),
        )
        failed = report.verdict == "fail"
        return Outcome(strip_pictures(report), report.warnings, 3 if failed else 0, ok=not failed)

    run("verify", options, work, render_verify)
