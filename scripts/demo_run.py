"""The demo: every demo checkpoint that has a runtime, in every type, judged by its pictures.

scripts/demo [--only NAME] [--types a,b] [--out DIR] [--seeds 0] [--threads N]
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from diffquant.cli.frame import human, table
from diffquant.cli.values import seeds_from
from diffquant.convert.jobs import JobReport, container_for, run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import DiffquantError
from diffquant.core.report import to_json
from diffquant.inspect.describe import describe
from diffquant.publish import column_label, render_comparisons, sample_grid
from diffquant.publish.compare_tables import cell
from diffquant.publish.rows import number_text, size_text
from diffquant.quant.types import type_named
from diffquant.runtime import scorers
from diffquant.runtime.compare_files import compare_files
from diffquant.runtime.compare_settings import CompareSettings, default_metrics
from diffquant.runtime.comparison import METRICS, Comparison, ComparisonPictures, Row
from diffquant.runtime.families import FAMILIES
from diffquant.runtime.verify import worst_of

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = scorers.DEMO_PROMPTS[:4]
# What each checkpoint's own card was judged with: guidance and sampler.
CFG = {"sd15": 3.0, "sdxl": 3.0}
SAMPLER = {"sd15": "ddim"}
SUFFIX = {"gguf": ".gguf", "safetensors": ".safetensors", "folder": ""}
MIN_PSNR = 25.0

MADE = ".diffquant-demo"
# What a reader compares first; every type would take a quarter of an hour, and some need a matrix.
DEFAULT_TYPES = (
    "f32", "bf16", "f16", "q8_0", "q6_k", "q4_k_s", "q4_0",
    "fp8_e4m3", "fp8_scaled", "int8_rowwise", "nf4",
)  # fmt: skip


def main() -> int:
    """Run the demo; 3 when a gate failed, as the command line does."""
    options = _options()
    out: Path = options.out
    if out.exists():
        shutil.rmtree(out)
    (out / "files").mkdir(parents=True)
    (out / MADE).write_text("made by scripts/demo, which replaces this folder\n")
    # Pictures of 128 pixels: on a busy machine torch's threads only wait for each other (five times
    # slower with two of them), on an idle one a second thread gains little.
    torch.set_num_threads(options.threads or 1)
    models = []
    started = time.monotonic()
    for folder in sorted((ROOT / "examples").glob("*-shapes")):
        if options.only and folder.name not in options.only.split(","):
            continue
        report = describe(folder)
        parts = ", ".join(f"{part.name} {human(part.nbytes)}" for part in report.parts)
        say(f"{folder.name}: {report.architecture} {report.variant} ({parts})")
        if report.architecture not in FAMILIES:
            say(f"{folder.name}: no runtime yet, so no pictures; it converts and quantizes")
            continue
        comparison, pictures = _run_model(folder, report.architecture, options)
        models.append((comparison, pictures))
        _print_table(comparison)
        drawn = [row for row in comparison.rows if row.name in pictures.rows]
        sample_grid(
            [(f"reference\n{size_text(comparison.reference_nbytes)}", pictures.reference)]
            + [(column_label(row), pictures.rows[row.name]) for row in drawn],
            [f"{text}, seed {seed}" for text in comparison.prompts for seed in comparison.seeds],
            out / f"{folder.name}.png",
        )
    render_comparisons(models, out / "index.html", title="diffquant demo")
    results = json.dumps([to_json(one) for one, _ in models], indent=1)
    (out / "results.json").write_text(results + "\n")
    say(f"done in {time.monotonic() - started:.0f} s: {out}/index.html, {out}/*.png")
    failed = [row for one, _ in models for row in one.candidates if row.verdict == "fail"]
    return 3 if failed else 0


def _run_model(
    folder: Path, architecture: str, options: argparse.Namespace
) -> tuple[Comparison, ComparisonPictures]:
    """Quantize to every type, then draw with the checkpoint and each file."""
    names = options.types.split(",") if options.types else list(DEFAULT_TYPES)
    jobs, files = [], []
    for index, name in enumerate(names):
        say(f"{folder.name} [{index + 1}/{len(names)}] {name}: quantize")
        path, job = _quantize(folder, name, options)
        files.append(path)
        jobs.append(job)
    say(f"{folder.name}: draw with {len(files)} files, the noise floor and the control")
    settings = CompareSettings(
        prompts=PROMPTS,
        seeds=tuple(int(seed) for seed in options.seeds.split(",")),
        steps=20,
        cfg=CFG.get(architecture),
        sampler=SAMPLER.get(architecture),
        size=(128, 128),
        metrics=default_metrics(PROMPTS),
        limits={"min_psnr": MIN_PSNR},
    )
    comparison, pictures = compare_files(folder, files, settings)
    told = dict(zip((path.name for path in files), jobs, strict=True))
    rows = tuple(_with_job(row, told[row.name]) if row.name in told else row
                 for row in comparison.rows)  # fmt: skip
    return replace(comparison, rows=rows), pictures


def _quantize(folder: Path, name: str, options: argparse.Namespace) -> tuple[Path, JobReport]:
    kind = type_named(name)
    container = next(iter(kind.dialects))
    out = options.out / "files" / f"{folder.name}-{name.upper()}{SUFFIX[container]}"
    request = Request(container=container_for(out), type=kind)
    return out, run_job(folder, out, request, workers=options.threads)


def _with_job(row: Row, job: JobReport) -> Row:
    """Add what the quantizing itself had to say."""
    notes = [] if job.container != "gguf" else ["the file holds the denoiser only"]
    verdict = worst_of([job.verdict or "pass", row.verdict or "pass"])
    problems = (*row.problems, *notes, *job.warnings)
    return replace(row, type=job.type, verdict=verdict, problems=problems)


def _print_table(it: Comparison) -> None:
    print()
    print(f"{it.reference}: the reference scores {number_text(it.reference_score, 3)}")
    titles = [METRICS[name].title for name in it.metrics]
    table(
        ("type", "size", "bits", "weight error", *titles, "verdict", "stored"),
        [
            (
                row.type or row.name,
                "-" if row.nbytes is None else size_text(row.nbytes),
                number_text(row.bits_per_weight, 2),
                number_text(row.weight_error, 4),
                *(cell(it, row, name) for name in it.metrics),
                row.verdict or "-",
                row.stored,
            )
            for row in it.rows
        ],
        right=tuple(range(1, 4 + len(titles))),
    )
    for name, why in it.missing.items():
        print(f"{METRICS[name].title} is missing: {why}")
    print(flush=True)


def say(text: str) -> None:
    """Print a progress line to stderr at once."""
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--only", default="", help="checkpoints, with commas")
    parser.add_argument(
        "--types", default="", help="types, with commas (default: one or two of each kind)"
    )
    parser.add_argument("--seeds", default="0", help="seeds, with commas")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    known = [folder.name for folder in (ROOT / "examples").glob("*-shapes")]
    if strange := sorted(set(filter(None, options.only.split(","))) - set(known)):
        parser.error(f"--only {strange[0]}: expected {', '.join(sorted(known))}")
    try:
        for name in filter(None, options.types.split(",")):
            type_named(name)
        seeds_from(options.seeds)
    except DiffquantError as error:
        parser.error(str(error))
    # What is there is replaced: only if an earlier run made it.
    if options.out.exists() and not (options.out / MADE).is_file() and any(options.out.iterdir()):
        parser.error(f"--out {options.out}: no demo made what is there; name a new folder")
    return options


if __name__ == "__main__":
    sys.exit(main())
