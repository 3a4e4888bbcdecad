"""`diffquant calibrate MODEL --prompts FILE -o imatrix.gguf`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from diffquant.cli.frame import Options, Outcome, common, echo, run
from diffquant.cli.values import check_free, device_from, fell_back, prompts_from, size_from
from diffquant.convert.sensitivity import keep_sensitivity, write_sensitivity
from diffquant.core.errors import UsageError
from diffquant.io.imatrix import check_target, write_imatrix
from diffquant.io.inputs import check_inputs_target, write_inputs

__all__ = ["command"]


@dataclass(frozen=True, slots=True)
class CalibrateReport:
    """What was measured, and where it was written.

    `unused` counts layers that no picture depends on; `kept` says whether the sensitivity is in
    the cache too, where `quantize` finds it; `importance` what the columns of -o weigh; `device`
    what computed, `device_why` why that.
    """

    output: str
    entries: int
    layers: int
    pictures: int
    calls: int
    chunk_size: int
    seconds: float
    inputs: str | None = None
    sensitivity: str | None = None
    unused: int = 0
    kept: bool = False
    importance: str = "inputs"
    device: str = "cpu"
    device_why: str = ""


@click.command("calibrate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--prompts", type=click.Path(path_type=Path), required=True, help="A prompt per line."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("imatrix.gguf"),
    show_default=True,
    help="File to write: .gguf, or .dat for older programs.",
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write mean and covariance of each layer's input too (.safetensors), for `quantize "
    "--rounding feedback --inputs FILE`.",
)
@click.option(
    "--importance",
    type=click.Choice(["inputs", "gradients"]),
    default="inputs",
    show_default=True,
    help="What columns of the matrix weigh: their mean squared input, or how much pictures depend "
    "on them, for which every picture is differentiated.",
)
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write what each format costs each tensor in pictures too (.json), for `quantize "
    "--max-size SIZE --sensitivity FILE`.",
)
@click.option("--among", help="Formats to price, with commas (default: GGUF's and bf16, f16, f32).")
@click.option(
    "--level",
    type=click.Choice(["pictures", "latents"]),
    help="What is differentiated for --sensitivity and --importance gradients; latents take less "
    "memory  [default: pictures]",
)
@click.option(
    "--weighed",
    is_flag=True,
    help="Price every format as encoded with the importance matrix, not only those that need one.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62),
    default=0,
    show_default=True,
    help="Seed of the first picture; each next one adds 1.",
)
@click.option("--steps", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--cfg", type=float, help="Guidance strength, 1 is off (default: the family's).")
@click.option("--guidance", type=float, help="Distilled guidance of Flux dev (default 3.5).")
@click.option("--size", metavar="WxH", help="Picture size (default: the model's own).")
@click.option("--sampler", help="euler, ddim, pndm (default: the model's own).")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="cpu, cuda, mps, or auto (a CUDA card that computes, else the CPU).",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Compute dtype.",
)
@click.option("--base", type=click.Path(path_type=Path), help="Where missing parts come from.")
@click.option("--vae", type=click.Path(path_type=Path), help="VAE file to use instead.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@common
def command(
    model: Path,
    prompts: Path,
    output: Path,
    inputs: Path | None,
    importance: Literal["inputs", "gradients"],
    sensitivity: Path | None,
    among: str | None,
    level: Literal["pictures", "latents"] | None,
    weighed: bool,
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
    force: bool,
    options: Options,
) -> None:
    """Measure an importance matrix of MODEL's denoiser while it draws one picture per prompt.

    `diffquant quantize --imatrix` spends bits where the measured inputs are strong. Prompts should
    look like those the model will be used with; runs on several prompt files can be merged with
    `diffquant imatrix`. With --sensitivity or --importance gradients every picture is made a second
    time and differentiated.
    """

    def work() -> Outcome:
        check_target(output, force=force)
        if inputs is not None:
            check_inputs_target(inputs, force=force)
        asked = _asked(
            sensitivity,
            among,
            level,
            weighed=weighed,
            differentiated=importance == "gradients",
            taken=(model, prompts, output, inputs),
            force=force,
        )
        lines = prompts_from(prompts)
        wanted = size_from(size)
        if seed + len(lines) > 2**63:
            raise UsageError(f"--seed {seed}: too large for {len(lines)} prompts")
        on = device_from(device)
        from diffquant.runtime.calibrate import calibrate
        from diffquant.runtime.pricing import AMONG, check_among

        names = check_among(asked or AMONG, matrix=True) if sensitivity is not None else ()
        started = time.perf_counter()
        how: dict[str, Any] = {
            "seed": seed,
            "steps": steps,
            "cfg": cfg,
            "guidance": guidance,
            "size": wanted,
            "sampler": sampler,
            "device": on.name,
            "dtype": dtype,
            "base": base,
            "vae": vae,
            "progress": options.bar(),
        }
        made = calibrate(model, lines, dataset=prompts.name, moments=inputs is not None, **how)
        matrix, found = made.matrix, None
        if sensitivity is not None or importance == "gradients":
            from diffquant.runtime.differentiate import differentiate_pictures, gradient_importance

            found = differentiate_pictures(model, lines, level=level or "pictures", **how)
            if importance == "gradients":
                matrix = gradient_importance(found, made.matrix, dataset=prompts.name)
        write_imatrix(output, matrix, force=force)
        if inputs is not None:
            ran = {
                "diffquant.architecture": made.architecture,
                "diffquant.inputs.dataset": prompts.name,
                "diffquant.inputs.pictures": str(made.pictures),
                "diffquant.inputs.steps": str(steps),
            }
            write_inputs(inputs, made.inputs, ran, force=force)
        warnings = [*fell_back(on), *made.warnings]
        unused, kept = 0, False
        if found is not None:
            unused = len(found.unused)
            warnings += [text for text in found.warnings if text not in warnings]
        if found is not None and found.unused and importance == "gradients":
            warnings.append(
                f"{unused} of {len(found.power)} layers change no picture here, such as "
                f"{found.unused[0]}: their columns weigh by inputs"
            )
        if found is not None and sensitivity is not None:
            from diffquant.runtime.sensitivity import price_formats

            priced = price_formats(
                model,
                found,
                names,
                matrix=matrix,
                everywhere=weighed,
                context={"steps": str(steps), "seed": str(seed), "weighed_by": importance},
                progress=how["progress"],
            )
            write_sensitivity(sensitivity, priced.sensitivity)
            kept = keep_sensitivity(priced.sensitivity)
            warnings += [text for text in priced.warnings if text not in warnings]
        entries = len(made.matrix.entries)
        if entries < made.layers:
            warnings.append(f"{made.layers - entries} layers were never called: no entry for them")
        packed = next(part for part in made.origins if part.name == "denoiser")
        odd = sorted(name for name in packed.formats if name not in ("f32", "f16", "bf16"))
        if odd:
            warnings.append(f"measured on a denoiser that is already quantized ({', '.join(odd)})")
        report = CalibrateReport(
            output=str(output),
            entries=entries,
            layers=made.layers,
            pictures=made.pictures,
            calls=made.calls,
            chunk_size=matrix.chunk_size,
            seconds=round(time.perf_counter() - started, 3),
            inputs=str(inputs) if inputs is not None else None,
            sensitivity=str(sensitivity) if sensitivity is not None else None,
            unused=unused,
            kept=kept,
            importance=importance,
            device=on.name,
            device_why=on.why,
        )
        return Outcome(report, warnings)

    def render(report: CalibrateReport) -> None:
        echo(f"wrote {report.output} in {report.seconds:.1f} s on {report.device}")
        if report.inputs is not None:
            echo(f"wrote {report.inputs}, mean and covariance of the inputs")
        if report.sensitivity is not None:
            echo(f"wrote {report.sensitivity}, what each format costs each tensor")
            if report.kept:
                echo("  kept in the cache too: quantize --max-size finds it for this checkpoint")
        echo(
            f"  {report.entries} layers, measured in {report.calls} calls of the denoiser for "
            f"{report.pictures} pictures"
        )

    run("calibrate", options, work, render)


def _asked(
    path: Path | None,
    among: str | None,
    level: str | None,
    *,
    weighed: bool,
    differentiated: bool,
    taken: tuple[Path | None, ...],
    force: bool,
) -> tuple[str, ...]:
    """Formats named by --among; refuses what has no effect, and a file that cannot be written."""
    if path is None:
        given = [name for name, value in (("--among", among), ("--weighed", weighed)) if value]
        if level is not None and not differentiated:
            given.append("--level")
        if given:
            raise UsageError(f"{' and '.join(given)}: only with --sensitivity FILE")
        return ()
    if path.suffix.lower() != ".json":
        raise UsageError(f"{path}: sensitivities are written as .json")
    check_free(path, taken, force=force)
    names = tuple(one.strip() for one in (among or "").split(",") if one.strip())
    if among is not None and not names:
        raise UsageError("--among: expected formats with commas, such as q3_k,q4_k,q6_k")
    return names
