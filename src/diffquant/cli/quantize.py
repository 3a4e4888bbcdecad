"""`diffquant quantize SRC -o OUT -t TYPE`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from diffquant.cli.ask_budget import (
    BudgetAsked,
    allocated_path,
    budget_options,
    check_alone,
    with_allocation,
)
from diffquant.cli.corrections import check_corrections, corrections_of
from diffquant.cli.frame import Options, Outcome, common, echo, run, threads
from diffquant.cli.job import JobOutcome, render_job, resumable
from diffquant.cli.judge import Judge
from diffquant.cli.merging import lora_options, loras_from
from diffquant.cli.outputs import (
    PLACE,
    check_several,
    default_output,
    folder_made,
    named_outputs,
    stem_of,
    types_from,
)
from diffquant.cli.values import check_free, lora_pairs, write_text
from diffquant.cli.verdict import render_pictures
from diffquant.cli.view_allocation import render_allocation
from diffquant.cli.view_several import SeveralOutcome, render_several
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.lora.merge import merging
from diffquant.convert.plan import Request
from diffquant.convert.recipe_source import load_recipe
from diffquant.convert.recipes import Recipe, recipe_of, render_recipe
from diffquant.convert.request import POLICIES, ROUNDINGS
from diffquant.convert.several import Wanted, run_jobs
from diffquant.convert.targets import TARGETS
from diffquant.convert.user_rules import user_rules
from diffquant.core.errors import UsageError
from diffquant.io.imatrix import merge_imatrices, read_imatrix
from diffquant.io.inputs import open_inputs
from diffquant.quant.type_sets import TYPE_SETS
from diffquant.quant.types import QuantType, type_named

__all__ = ["command"]

_RANK = 32
_DEFAULT_SUFFIX = {"gguf": ".gguf", "safetensors": ".safetensors", "folder": ""}


@click.command("quantize")
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(),
    help="File or folder to write. Of several types: a folder (with a slash at its end), or a name "
    f"with {PLACE} in it.",
)
@click.option(
    "-t",
    "--type",
    "type_names",
    multiple=True,
    metavar="TYPE",
    help="Type; see `diffquant formats`. Several are written in one pass over the source.",
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="NAME",
    help="Types that are published together: "
    + "; ".join(f"{name} = {', '.join(names)}" for name, names in TYPE_SETS.items())
    + ".",
)
@click.option(
    "--recipe-from",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take each tensor's format from a recipe or from any checkpoint; -t is then optional.",
)
@click.option(
    "--emit-recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the format of every tensor to a text file; with --dry-run too.",
)
@click.option(
    "--arch",
    default="",
    metavar="NAME",
    help="Take the source for this architecture; `generic` packs any transformer's blocks.",
)
@click.option("--part", "parts", multiple=True, metavar="NAME", help="Write only this part.")
@click.option("--all", "all_parts", is_flag=True, help="Quantize text encoders and VAE as well.")
@click.option(
    "--tensor-type",
    "tensor_types",
    multiple=True,
    metavar="REGEX=FORMAT",
    help="Store matching tensors in another format; first match wins.",
)
@click.option(
    "--exclude", multiple=True, metavar="REGEX", help="Keep matching tensors unquantized."
)
@budget_options
@click.option("--pure", is_flag=True, help="One format throughout: ignore the type's mix.")
@click.option(
    "--target",
    default="",
    metavar="NAME",
    help="Program the output is for: " + ", ".join(TARGETS) + ". Default: as many as can read it.",
)
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default=POLICIES[0],
    show_default=True,
    help="The peers' mix, or ours where measurements show that theirs misses.",
)
@click.option(
    "--imatrix",
    "imatrices",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Importance matrix, .gguf or .dat (`diffquant calibrate`); several are merged.",
)
@click.option(
    "--rounding",
    type=click.Choice(ROUNDINGS),
    default=ROUNDINGS[0],
    show_default=True,
    help="nearest: the bytes other programs write. search: the best scales. feedback: errors made "
    "up for by later columns; needs --inputs. Same size, see docs/rounding.md.",
)
@click.option(
    "--inputs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Statistics of layer inputs (`diffquant calibrate --inputs`), for --rounding, "
    "--bias-correction and --error-lora.",
)
@click.option(
    "--bias-correction",
    is_flag=True,
    help="Shift biases by what rounding takes from the mean output; needs --inputs.",
)
@click.option(
    "--error-lora",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the quantization error as a LoRA that any loader can add (.safetensors).",
)
@click.option("--rank", type=click.IntRange(1, 1024), help="Rank of the error LoRA.  [default: 32]")
@lora_options
@click.option("--allow-requantize", is_flag=True, help="Accept an already quantized source.")
@click.option("--base", type=click.Path(path_type=Path), help="Folder to take configs from.")
@click.option(
    "--verify",
    type=click.Choice(["none", "load", "tensors", "image"]),
    default="tensors",
    show_default=True,
    help="How the output is checked.",
)
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="A prompt per line, for --verify image."
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="What encodes: auto (cards where there are any and it pays), cpu, cuda (all cards) or "
    "cuda:N. The bytes are the same. Pictures of --verify image are drawn there too; by auto on a "
    "CUDA card that computes.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@resumable
@threads
@common
def command(
    source: Path,
    output: str | None,
    type_names: tuple[str, ...],
    sets: tuple[str, ...],
    recipe_from: Path | None,
    emit_recipe: Path | None,
    arch: str,
    parts: tuple[str, ...],
    all_parts: bool,
    tensor_types: tuple[str, ...],
    exclude: tuple[str, ...],
    pure: bool,
    target: str,
    policy: str,
    imatrices: tuple[Path, ...],
    rounding: str,
    inputs: Path | None,
    bias_correction: bool,
    error_lora: Path | None,
    rank: int | None,
    loras: tuple[str, ...],
    te_scale: float,
    allow_missing: bool,
    allow_requantize: bool,
    base: Path | None,
    verify: str,
    prompts: Path | None,
    device: str,
    dry_run: bool,
    force: bool,
    resume: bool,
    asked: BudgetAsked,
    options: Options,
) -> None:
    """Quantize SOURCE (a checkpoint file or Diffusers folder) to TYPE.

    The extension of -o chooses the container: .gguf holds the denoiser, or the one part that --part
    names (a text encoder, or mmproj: its image tower); .safetensors the parts the source has; no
    extension a Diffusers folder. Only the denoiser is quantized unless --all or --part.

    --max-size, --bpw or --vram in place of a type choose a format for each tensor of the denoiser,
    so that the predicted error is least: see docs/allocate.md.

    Several types (-t A -t B, or --set) are several outputs in one pass: NAME-TYPE.gguf and
    NAME_TYPE.safetensors in the folder that -o names, or as its {type} says.
    """

    def work() -> Outcome:
        judge = Judge(verify, prompts, device, options)
        check_corrections(inputs, error_lora, rank, bias=bias_correction)
        budget = asked.budget
        kinds = types_from(type_names, sets)
        if budget is not None:
            check_alone(budget, output, types=kinds, recipe_from=recipe_from, pure=pure)
        if len(kinds) > 1:
            check_several(
                resume=resume,
                recipe_from=recipe_from,
                emit_recipe=emit_recipe,
                error_lora=error_lora,
            )
        recipe = load_recipe(recipe_from) if recipe_from is not None else None
        wants: tuple[QuantType | None, ...] = kinds
        paths: tuple[Path, ...]
        if budget is not None:
            wants = (None,)
            paths = (asked.path(output, target),)
        elif len(kinds) > 1 or (output is not None and PLACE in output):
            paths = named_outputs(output, stem_of(source, parts), kinds)
        else:
            kind = kinds[0] if kinds else _kind_of(recipe)
            wants = (kind,)
            paths = (Path(output) if output else default_output(source, kind, parts),)
        if emit_recipe is not None:
            read = (source, recipe_from, inputs, prompts, base, asked.sensitivity, *imatrices)
            merged = [path for path, _ in lora_pairs(loras)]
            check_free(emit_recipe, (*read, *merged, *paths, error_lora), force=force)
        requests = [
            Request(
                container=container_for(out),
                type=kind,
                parts=parts,
                all_parts=all_parts,
                rules=user_rules(tensor_types, exclude),
                pure=pure,
                allow_requantize=allow_requantize,
                target=target,
                arch=arch,
                policy=policy,
                recipe=recipe,
                rounding=rounding,
                bias_correction=bias_correction,
                lora_rank=(rank or _RANK) if error_lora is not None else 0,
            )
            for out, kind in zip(paths, wants, strict=True)
        ]
        common: Any = {
            "base": base,
            "force": force,
            "dry_run": dry_run,
            "device": device,
            "workers": options.threads,
            "verify": "tensors" if verify == "image" else verify,
            "progress": options.bar(),
            "matrix": merge_imatrices([read_imatrix(path) for path in imatrices])
            if imatrices
            else None,
        }
        given = loras_from(loras, te_scale)
        with (
            open_inputs(inputs) if inputs is not None else nullcontext() as measured,
            merging(source, given, arch=arch, allow_missing=allow_missing) as merge,
        ):
            common["inputs"] = measured
            common["beside"] = merge.paths
            requests = [merge.into(one) for one in requests]
            if len(kinds) > 1:
                wanted = [Wanted(out, one) for out, one in zip(paths, requests, strict=True)]
                with folder_made(output, dry_run=dry_run):
                    several = merge.told_each(run_jobs(source, wanted, **common))
                return judge.outputs(several, source)
            (out,), (request,), chosen = paths, requests, None
            if budget is not None:
                chosen = asked.chosen(source, request, out, common)
                out, request = allocated_path(output, source, parts, chosen), chosen.request
            report = run_job(source, out, request, resume=resume, error_lora=error_lora, **common)
            report = merge.told(report)
        if emit_recipe is not None:
            rows = [(row.part, row.key, row.stored) for row in report.tensors]
            named = chosen.label if chosen is not None else wants[0]
            made = recipe_of(report.architecture, named.name if named else "", rows)
            text = render_recipe(made, rounding=rounding)
            write_text(emit_recipe, text + corrections_of(report))
        outcome = judge.output(report, source, out)
        return outcome if chosen is None else with_allocation(outcome, chosen.report)

    def render(outcome: JobOutcome | SeveralOutcome) -> None:
        if isinstance(outcome, SeveralOutcome):
            render_several(outcome, verbose=options.verbose > 0)
            for one in outcome.outputs:
                if one.image is not None:
                    echo(f"  pictures of {one.job.type}:")
                    render_pictures(one.image)
            return
        render_job(outcome.job, verbose=options.verbose > 0)
        if outcome.allocation is not None:
            render_allocation(outcome.allocation, explain=asked.explain)
        if outcome.image is not None:
            render_pictures(outcome.image)

    run("quantize", options, work, render)


def _kind_of(recipe: Recipe | None) -> QuantType:
    """The type that labels the recipe, where none was asked for."""
    if recipe is None:
        raise UsageError("give a type with -t, or a file to take the formats from: --recipe-from")
    if not recipe.type:
        raise UsageError(f"{recipe.name} names no type that is known here: give one with -t")
    return type_named(recipe.type)
