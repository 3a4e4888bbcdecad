"""`diffquant lora convert IN OUT --to NAMING`: the same LoRA under other names."""

from __future__ import annotations

from pathlib import Path

import click

from diffquant.cli.frame import Options, Outcome, common, echo, human, run
from diffquant.convert.lora.conversion import ConversionReport, convert_lora
from diffquant.convert.lora.spelling import SPELLINGS

__all__ = ["command"]

_LISTED = 8


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(list(SPELLINGS)), required=True, help="Whose names.")
@click.option(
    "--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Cast the factors (default: keep)."
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="The model it is for, where it is none of the published ones.",
)
@click.option(
    "--unet-names",
    type=click.Choice(["diffusers", "original"]),
    default="diffusers",
    show_default=True,
    help="How kohya files name a UNet's modules; sd-scripts itself writes original ones for SDXL.",
)
@click.option("--adapter-name", default="", metavar="NAME", help="PEFT's name of the adapter.")
@click.option("--allow-missing", is_flag=True, help="Leave out layers the model does not have.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@common
def command(
    source: Path,
    output: Path,
    to: str,
    dtype: str | None,
    base: Path | None,
    unet_names: str,
    adapter_name: str,
    allow_missing: bool,
    dry_run: bool,
    force: bool,
    options: Options,
) -> None:
    r"""Write SOURCE's deltas under the names of another program.

    \b
    kohya      sd-scripts, ComfyUI, Forge, stable-diffusion.cpp, Diffusers
    comfy      ComfyUI (diffusion_model.)
    diffusers  Diffusers (unet. or transformer.)
    peft       PEFT (base_model.model.); OUTPUT without an extension is a folder as PEFT saves it
    bfl        PEFT around Black Forest Labs' names, Flux.1 alone

    Modules that other programs fuse or split are joined or cut: the deltas stay what they were.
    """

    def work() -> Outcome:
        report = convert_lora(
            source,
            output,
            to=to,
            dtype=dtype,
            base=base,
            original=unet_names == "original",
            adapter=adapter_name,
            allow_missing=allow_missing,
            force=force,
            dry_run=dry_run,
            progress=options.bar(),
        )
        return Outcome(report)

    run("lora convert", options, work, _render)


def _render(report: ConversionReport) -> None:
    verb = "would write" if report.dry_run else "wrote"
    echo(f"{verb} {report.output}, {human(report.nbytes)}")
    echo(f"  {report.base}: {report.naming} -> {SPELLINGS[report.to].title}")
    ranks = [
        f"rank {rank} ({count})" if rank else f"no rank ({count})"
        for rank, count in report.ranks.items()
    ]
    echo(f"  {report.layers} layers -> {report.written} modules; {', '.join(ranks[:4])}")
    if report.split:
        echo(f"  {report.split} layers are cut into several modules")
    if report.joined:
        echo(f"  {report.joined} modules are joined of several layers")
    for note in report.notes:
        echo(f"  {note}")
    for name, why in report.left_out[:_LISTED]:
        echo(f"  left out: {name:.120}: {why}")
    if len(report.left_out) > _LISTED:
        echo(f"  and {len(report.left_out) - _LISTED} more left out")
