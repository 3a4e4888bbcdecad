"""`diffquant compare REF CAND...`: several files beside their reference, by their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffquant.cli.ask_gates import gate_options
from diffquant.cli.ask_sides import Sides, side_options
from diffquant.cli.frame import Options, Outcome, common, run
from diffquant.cli.sections import Sectioned
from diffquant.cli.values import check_free, device_from, fell_back, write_text
from diffquant.core.errors import UsageError
from diffquant.io.atomic import partial_path

if TYPE_CHECKING:
    from diffquant.runtime.comparison import Comparison, ComparisonPictures

__all__ = ["command"]

_PARTS = ("denoiser", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


class _Compare(Sectioned):
    sections: Mapping[str, tuple[str, ...]] = {
        "Pictures": ("prompts", "seeds", "steps", "cfg", "sampler", "size"),
        "What is compared": ("only", "base", "vae", "engine", "synthetic", "device"),
        "Metrics": ("metrics", "lpips_weights", "clip_model"),
        "Gates (exit code 3)": (
            "min_psnr", "min_ssim", "max_flip", "max_lpips", "max_rel_error",
        ),
        "Output": ("csv_path", "markdown_path", "html_path", "force"),
    }  # fmt: skip


@click.command("compare", cls=_Compare)
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidates", nargs=-1, required=True, type=click.Path(path_type=Path))
@side_options
@click.option(
    "--metrics",
    metavar="NAME,...",
    help="Columns: psnr, ssim, flip, ssimulacra2, lpips, clip, prompt (default: the first five, "
    "and prompt where the prompts are the demo checkpoints').",
)
@click.option("--clip-model", metavar="NAME", help="Folder or Hub id of a CLIP model.")
@gate_options()
@click.option(
    "--only",
    type=click.Choice(_PARTS),
    help="Take this part alone from each candidate, everything else from the reference.",
)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the rows as CSV.")
@click.option(
    "--markdown", "markdown_path", type=click.Path(path_type=Path), help="Write a Markdown table."
)
@click.option(
    "--html", "html_path", type=click.Path(path_type=Path), help="Write a page with the pictures."
)
@click.option("--force", is_flag=True, help="Replace existing outputs.")
@common
def command(
    reference: Path,
    candidates: tuple[Path, ...],
    sides: Sides,
    metrics: str | None,
    clip_model: str | None,
    limits: dict[str, float],
    only: str | None,
    csv_path: Path | None,
    markdown_path: Path | None,
    html_path: Path | None,
    force: bool,
    options: Options,
) -> None:
    """Draw the same pictures with REFERENCE and each of CANDIDATES, and measure how far they are.

    The table has two more rows: the noise floor (the reference in bfloat16) and the control (the
    first candidate with a block damaged), which say what the numbers are worth. Without gates the
    exit code is 0 whatever the table says; with gates it is 3 when a candidate fails.
    """

    def work() -> Outcome:
        outputs = {"csv": csv_path, "markdown": markdown_path, "html": html_path}
        read = (reference, *candidates, *sides.reads)
        _check_outputs(outputs, read, force=force)
        lines, shared = sides.lines(), sides.settings()
        on = device_from(sides.device, sides.engine)
        from diffquant.runtime.compare import DEFAULT_PROMPTS
        from diffquant.runtime.compare_files import compare_files
        from diffquant.runtime.compare_settings import CompareSettings, default_metrics

        asked = lines or DEFAULT_PROMPTS
        columns = tuple(one.strip() for one in metrics.split(",")) if metrics is not None else None
        settings = CompareSettings(
            prompts=asked,
            metrics=default_metrics(asked) if columns is None else columns,
            limits=limits,
            only=only,
            base=sides.base,
            vae=sides.vae,
            keep_pictures=html_path is not None,
            clip_model=clip_model,
            device=on.name,
            **shared,
        )
        comparison, pictures = compare_files(
            reference, candidates, settings, progress=options.bar()
        )
        _write(comparison, pictures, outputs)
        failed = bool(limits) and any(row.verdict == "fail" for row in comparison.candidates)
        warnings = (*fell_back(on), *comparison.warnings)
        return Outcome(comparison, warnings, 3 if failed else 0, ok=not failed)

    def render(comparison: Any) -> None:  # noqa: ANN401 - Comparison
        from diffquant.cli.view_compare import render_comparison_tables

        render_comparison_tables(comparison, verbose=options.verbose > 0)

    run("compare", options, work, render)


def _check_outputs(
    outputs: Mapping[str, Path | None], read: tuple[Path | None, ...], *, force: bool
) -> None:
    """Refuse outputs that cannot be written, or would overwrite what is read or each other."""
    taken = list(read)
    for path in outputs.values():
        if path is not None:
            check_free(path, taken, force=force)
            for one in read:
                if one is not None and path.exists() and one.is_dir() and _within(path, one):
                    raise UsageError(f"{path} is a part of {one}, which is read")
            taken.append(path)


def _within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _write(
    comparison: Comparison, pictures: ComparisonPictures, outputs: Mapping[str, Path | None]
) -> None:
    """Write what was asked for; each file exists only when it is whole."""
    from diffquant.publish.compare_page import render_comparison
    from diffquant.publish.compare_tables import csv_text, markdown_text

    csv, markdown, html = (outputs[name] for name in ("csv", "markdown", "html"))
    if csv is not None:
        write_text(csv, csv_text(comparison))
    if markdown is not None:
        write_text(markdown, markdown_text(comparison))
    if html is not None:
        beside = partial_path(html)
        try:
            render_comparison(comparison, pictures, beside)
            beside.replace(html)
        finally:
            beside.unlink(missing_ok=True)
