"""`diffquant generate MODEL -p PROMPT -o out.png`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from diffquant.cli.ask_memory import memory_from, memory_options, render_memory
from diffquant.cli.ask_picture import SECTIONS, fields_from, pairs_of_parts, picture_options
from diffquant.cli.frame import Options, Outcome, common, echo, human, run
from diffquant.cli.sections import Sectioned
from diffquant.cli.values import device_from, fell_back, lora_pairs
from diffquant.core.errors import UsageError
from diffquant.io.atomic import check_parent

if TYPE_CHECKING:
    from diffquant.runtime.compile_choice import Mode
    from diffquant.runtime.compute import Mode as ComputeMode
    from diffquant.runtime.devices import Device
    from diffquant.runtime.graph_choice import Mode as GraphMode
    from diffquant.runtime.session import Made

__all__ = ["command"]


class _Generate(Sectioned):
    sections = SECTIONS


@dataclass(frozen=True, slots=True)
class ChosenPreset:
    """Settings that were recognised, and by what."""

    name: str
    title: str
    why: str
    source: str


@dataclass(frozen=True, slots=True)
class GenerateReport:
    """What was generated, with what, from where.

    Attributes:
        parameters: of the first picture; `pictures` has those of each.
        device: what computed; `device_why` says why that one.
        seconds: of the whole run; `phases` has those of its parts.
        memory: of each pass, how its weights were placed and what that takes.
        compiling: of each pass, whether its blocks were compiled, and why.
        graphs: of each pass, how many calls were replays of a CUDA graph, or why none.
        computing: of each pass, what how many layers were computed in, and why.
        dry_run: nothing was made: `outputs` and `parameters` are empty.
    """

    outputs: tuple[str, ...]
    parameters: Mapping[str, Any]
    pictures: tuple[Mapping[str, Any], ...]
    parts: tuple[Any, ...]
    loras: tuple[Any, ...]
    preset: ChosenPreset | None
    device: str
    device_why: str
    seconds: float
    phases: Mapping[str, float]
    memory: tuple[Any, ...]
    compiling: Mapping[str, str]
    graphs: Mapping[str, str]
    computing: Mapping[str, tuple[str, ...]]
    dry_run: bool


@click.command("generate", cls=_Generate)
@click.argument("model", type=click.Path(path_type=Path))
@picture_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    help="PNG to write, its parameters inside; several become out-1.png, out-2.png ...",
)
@click.option("--force", is_flag=True, help="Replace existing pictures.")
@click.option(
    "--from-image",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Repeat a picture by its parameters (ours, A1111's, ComfyUI's); options win over them.",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="auto (default): few-step models are recognised; none; or a name.",
)
@click.option("--base", type=click.Path(path_type=Path), help="Where missing parts come from.")
@click.option("--vae", type=click.Path(path_type=Path), help="VAE file to use instead.")
@click.option("--add", "added", multiple=True, metavar="PART=FILE", help="A part's own file.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder of the tokenizer.")
@click.option("--lora", "loras", multiple=True, metavar="FILE:WEIGHT", help="Side-branch LoRA.")
@click.option(
    "--engine",
    type=click.Choice(["bundled", "diffusers", "sdcpp"]),
    default="bundled",
    show_default=True,
    help="Program that draws; others than the bundled one where they are installed.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto (a CUDA card that computes, else the CPU), cpu, cuda or mps.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Computed in; auto: bfloat16 where the device multiplies it natively, else float32.",
)
@click.option(
    "--preview",
    metavar="rgb|FILE",
    help="Write OUT.preview.png on the way: by colours, or a tiny autoencoder's file (TAESD).",
)
@click.option(
    "--compile",
    "compile_mode",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Compile the denoiser's blocks once: faster steps; auto: on a GPU, where it repays.",
)
@click.option(
    "--cuda-graphs",
    "graphs",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Launch a step's kernels at once; auto: on CUDA, where weights stay and steps suffice.",
)
@click.option(
    "--compute",
    type=click.Choice(["auto", "exact", "fp8", "int8"]),
    help="Multiply the denoiser's blocks in 8 bits on a GPU; auto: as weights are stored "
    "(default: exact).",
)
@memory_options
@click.option("--dry-run", is_flag=True, help="Show the memory plan; read no weight.")
@common
def command(
    model: Path,
    output: Path,
    force: bool,
    from_image: Path | None,
    preset: str | None,
    base: Path | None,
    vae: Path | None,
    added: tuple[str, ...],
    tokenizer: Path | None,
    loras: tuple[str, ...],
    engine: str,
    device: str,
    dtype: str,
    preview: str | None,
    compile_mode: str,
    graphs: str,
    compute: str | None,
    memory: dict[str, Any],
    dry_run: bool,
    options: Options,
    **asked: Any,  # noqa: ANN401 - the options of a picture
) -> None:
    """Generate pictures from MODEL: a folder, a checkpoint, or a packed file with --base.

    Weights stay packed in memory and are decoded layer by layer. The same seed gives the same
    picture, and a picture repeats itself: diffquant generate MODEL --from-image out.png
    """

    def work() -> Outcome:
        if output.suffix.lower() != ".png":
            raise UsageError(f"{output}: pictures are written as .png")
        check_parent(output)
        fields = fields_from(asked)
        if "prompt" not in fields and from_image is None:
            raise UsageError("no prompt: give one with -p, or a picture to repeat, --from-image")
        pairs = lora_pairs(loras)
        parts = pairs_of_parts(added, vae, tokenizer)
        # stable-diffusion.cpp's binding is built for the CPU.
        on = device_from(device, engine)
        from diffquant.runtime.job import Job, Preview
        from diffquant.runtime.memory.budget import Asked
        from diffquant.runtime.repeat import read_recipe
        from diffquant.runtime.session import generate_pictures, numbered, plan_pictures

        taken = numbered(output, fields.get("batch", 1))
        if preview is not None:
            taken = (*taken, output.with_name(f"{output.stem}.preview.png"))
        for path in taken:
            if path.exists() and not (force or dry_run):
                raise UsageError(f"{path} exists; use --force to replace it")
        recipe = read_recipe(from_image) if from_image is not None else None
        recorded = {one.name: one.weight for one in recipe.loras} if recipe is not None else {}
        pairs = tuple(  # a weight that is not typed is the picture's
            (path, recorded.get(path.stem, weight) if text == str(path) else weight)
            for text, (path, weight) in zip(loras, pairs, strict=True)
        )
        job = Job(
            model=model,
            output=output,
            fields=fields,
            base=base,
            added=parts,
            loras=pairs,
            image=asked["image"],
            mask=asked["mask"],
            refiner=asked["refiner"],
            hires_model=asked["hires_model"],
            device=on.name,
            dtype=dtype,
            preset=preset,
            preview=None if preview is None else _preview(preview, Preview),
            recipe=recipe,
            memory=memory_from(memory),
            compile=cast("Mode", compile_mode),
            graphs=cast("GraphMode", graphs),
            compute=cast("ComputeMode | None", compute),
        )
        if engine != "bundled" and (dry_run or job.memory != Asked()):
            raise UsageError(
                f"--vram, --ram, --offload, --decode and --dry-run are of the bundled engine: "
                f"{engine} places weights in its own way"
            )
        if engine != "bundled" and compile_mode != "auto":
            raise UsageError("--compile is of the bundled engine")
        if engine != "bundled" and graphs != "auto":
            raise UsageError("--cuda-graphs is of the bundled engine")
        if engine != "bundled" and compute is not None:
            raise UsageError("--compute is of the bundled engine")
        if dry_run:
            made = plan_pictures(job, options.bar())
        elif engine == "bundled":
            made = generate_pictures(job, options.bar())
        else:
            from diffquant.runtime.elsewhere import generate_elsewhere

            made = generate_elsewhere(job, engine, options.bar())
        return Outcome(_report(made, on, dry_run=dry_run), (*fell_back(on), *made.warnings))

    run(
        "generate",
        options,
        work,
        functools.partial(_render, explain=dry_run or options.verbose > 0),
    )


def _preview(text: str, kind: Any) -> Any:  # noqa: ANN401 - job.Preview, loaded with torch
    if text == "rgb":
        return kind()
    path = Path(text)
    if not path.is_file():
        raise UsageError(f"--preview {text}: expected rgb, or the file of a tiny autoencoder")
    return kind(path)


def _report(made: Made, device: Device, *, dry_run: bool) -> GenerateReport:
    one = made.preset
    chosen = None if one is None else ChosenPreset(one.name, one.title, one.why, one.source)
    return GenerateReport(
        outputs=tuple(str(path) for path in made.outputs),
        parameters=made.parameters[0] if made.parameters else {},
        pictures=made.parameters,
        parts=made.origins,
        loras=made.loras,
        preset=chosen,
        device=device.name,
        device_why=device.why,
        seconds=round(sum(made.seconds.values()), 3),
        phases=made.seconds,
        memory=made.memory,
        compiling=made.compiling,
        graphs=made.graphs,
        computing=made.computing,
        dry_run=dry_run,
    )


def _render(report: GenerateReport, *, explain: bool) -> None:
    names = ", ".join(report.outputs)
    phases = ", ".join(f"{name} {seconds:.2g}" for name, seconds in report.phases.items())
    if report.dry_run:
        echo("nothing was made (--dry-run)")
    else:
        echo(f"wrote {names} in {report.seconds:.1f} s on {report.device} ({phases})")
    if explain:
        echo(f"  device: {report.device} ({report.device_why})")
    render_memory(report.memory, explain=explain)
    for label, text in report.compiling.items() if explain else ():
        echo(f"  compile, {label}: {text}")
    for label, text in report.graphs.items() if explain else ():
        echo(f"  graphs, {label}: {text}")
    for label, rows in report.computing.items() if explain else ():
        for text in rows:
            echo(f"  compute, {label}: {text}")
    if report.preset is not None and report.preset.name != "default":
        echo(f"  preset {report.preset.name}: {report.preset.why}")
    for part in report.parts:
        stored = ", ".join(sorted(part.formats, key=lambda name: -part.formats[name])[:3])
        echo(f"  {part.name}: {human(part.nbytes)} packed ({stored})")
    for lora in report.loras:
        echo(f"  lora {lora.path}: weight {lora.weight:g}, {lora.matched} layers, rank {lora.rank}")
