"""`diffquant generate MODEL -p PROMPT -o out.png`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from diffquant.cli.frame import Options, Outcome, common, echo, human, run
from diffquant.cli.values import check_device, lora_pairs, size_from
from diffquant.core.errors import UsageError

__all__ = ["command"]


@dataclass(frozen=True, slots=True)
class GenerateReport:
    """What was generated, with what, from where."""

    outputs: tuple[str, ...]
    parameters: dict[str, Any]
    parts: tuple[Any, ...]
    loras: tuple[Any, ...]
    seconds: float


@click.command("generate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, help="What to show.")
@click.option("-n", "--negative", help="What to stay away from; needs --cfg above 1.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--cfg", type=float, help="Guidance strength, 1 is off (default: the family's).")
@click.option("--guidance", type=float, help="Distilled guidance of Flux dev (default 3.5).")
@click.option("--size", metavar="WxH", help="Picture size (default: the model's own).")
@click.option("--sampler", help="euler, ddim, pndm (default: the model's own).")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or mps.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Compute dtype of the denoiser and text encoders.",
)
@click.option("--base", type=click.Path(path_type=Path), help="Where missing parts come from.")
@click.option("--vae", type=click.Path(path_type=Path), help="VAE file to use instead.")
@click.option("--lora", "loras", multiple=True, metavar="FILE:WEIGHT", help="Side-branch LoRA.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="PNG to write; parameters are embedded.",
)
@click.option("--force", is_flag=True, help="Replace an existing picture.")
@common
def command(
    model: Path,
    prompt: str,
    negative: str | None,
    seed: int,
    steps: int,
    cfg: float | None,
    guidance: float | None,
    size: str | None,
    sampler: str | None,
    device: str,
    dtype: str,
    base: Path | None,
    vae: Path | None,
    loras: tuple[str, ...],
    output: Path,
    force: bool,
    options: Options,
) -> None:
    """Generate a picture from MODEL: a folder, a checkpoint, or a packed file with --base.

    Weights stay packed in memory and are decoded layer by layer. The same seed gives the same
    picture.
    """

    def work() -> Outcome:
        if output.suffix.lower() != ".png":
            raise UsageError(f"{output}: pictures are written as .png")
        if output.exists() and not force:
            raise UsageError(f"{output} exists; use --force to replace it")
        wanted = size_from(size)
        pairs = lora_pairs(loras)
        check_device(device)
        from diffquant.runtime.session import generate_picture

        bar = options.bar()
        started = time.perf_counter()
        made = generate_picture(
            model,
            prompt,
            negative,
            seed=seed,
            steps=steps,
            cfg=cfg,
            guidance=guidance,
            size=wanted,
            sampler=sampler,
            device=device,
            dtype=dtype,
            base=base,
            vae=vae,
            loras=pairs,
            output=output,
            progress=bar,
        )
        seconds = time.perf_counter() - started
        report = GenerateReport(
            (str(output),), made.parameters, made.origins, made.loras, round(seconds, 3)
        )
        return Outcome(report, made.warnings)

    def render(report: GenerateReport) -> None:
        echo(f"wrote {report.outputs[0]} in {report.seconds:.1f} s")
        for part in report.parts:
            stored = ", ".join(sorted(part.formats, key=lambda name: -part.formats[name])[:3])
            echo(f"  {part.name}: {human(part.nbytes)} in memory ({stored})")
        for lora in report.loras:
            echo(
                f"  lora {lora.path}: weight {lora.weight:g}, {lora.matched} layers, "
                f"rank {lora.rank}"
            )

    run("generate", options, work, render)
