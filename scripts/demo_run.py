"""The demo: every demo checkpoint that has a runtime, in every type, judged by its pictures.

scripts/demo [--only NAME] [--types a,b] [--out DIR] [--seeds 0] [--threads N]
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from diffquant.cli.frame import human, table
from diffquant.convert.jobs import JobReport, container_for, run_job
from diffquant.convert.plan import Request
from diffquant.inspect.describe import describe
from diffquant.publish import (
    DemoModel,
    DemoRow,
    ModelPictures,
    column_label,
    render_page,
    sample_grid,
)
from diffquant.publish.rows import decibel_text, number_text, size_text
from diffquant.quant.types import type_named
from diffquant.runtime import scorers
from diffquant.runtime.compare import ImageSettings, Reference, compare_pictures, make_reference
from diffquant.runtime.families import FAMILIES
from diffquant.runtime.verify import worst_of

ROOT = Path(__file__).resolve().parents[1]
# What each checkpoint's own card was judged with.
SETTINGS = {
    "sd15": ImageSettings(steps=20, cfg=3.0, sampler="ddim", size=(128, 128)),
    "sdxl": ImageSettings(steps=20, cfg=3.0, size=(128, 128)),
    "flux1": ImageSettings(steps=20, size=(128, 128)),
    "qwen_image": ImageSettings(steps=20, size=(128, 128)),
}
SUFFIX = {"gguf": ".gguf", "safetensors": ".safetensors", "folder": ""}
PROMPTS = scorers.DEMO_PROMPTS[:4]

# What a reader compares first; every type would take a quarter of an hour, and some need a matrix.
DEFAULT_TYPES = (
    "f32", "bf16", "f16", "q8_0", "q6_k", "q4_k_s", "q4_0",
    "fp8_e4m3", "fp8_scaled", "int8_rowwise", "nf4",
)  # fmt: skip


def main() -> int:
    """Run the demo; 3 when a gate failed, as the command line does."""
    options = _options()
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    (out / "files").mkdir(parents=True)
    # Pictures of 128 pixels: on a busy machine torch's threads only wait for each other (five times
    # slower with two of them), on an idle one a second thread gains little.
    torch.set_num_threads(options.threads or 1)
    models, pictures = [], {}
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
        model, kept = _run_model(folder, report.architecture, options)
        models.append(model)
        pictures[model.name] = kept
        _print_table(model)
        sample_grid(
            [(f"original\n{size_text(model.nbytes)}", kept.reference)]
            + [(column_label(row), kept.candidates[row.type]) for row in model.rows],
            model.prompts,
            out / f"{folder.name}.png",
        )
    render_page(models, pictures, out / "index.html")
    (out / "results.json").write_text(json.dumps([asdict(one) for one in models], indent=1) + "\n")
    say(f"done in {time.monotonic() - started:.0f} s: {out}/index.html, {out}/*.png")
    failed = [row for model in models for row in model.rows if row.verdict == "fail"]
    return 3 if failed else 0


def _run_model(
    folder: Path, architecture: str, options: argparse.Namespace
) -> tuple[DemoModel, ModelPictures]:
    settings = ImageSettings(
        **{
            **{name: getattr(SETTINGS[architecture], name) for name in ("steps", "cfg", "sampler")},
            "size": SETTINGS[architecture].size,
            "prompts": PROMPTS,
            "seeds": tuple(int(seed) for seed in options.seeds.split(",")),
        }
    )
    reference = make_reference(folder, settings)
    names = options.types.split(",") if options.types else list(DEFAULT_TYPES)
    rows, candidates = [], {}
    for index, name in enumerate(names):
        say(f"{folder.name} [{index + 1}/{len(names)}] {name}: quantize, verify")
        row, made = _run_type(folder, name, settings, reference, options)
        rows.append(row)
        candidates[name] = made
    prompts = [prompt for prompt in settings.prompts for _ in settings.seeds]
    model = DemoModel(
        name=folder.name,
        architecture=architecture,
        source=f"examples/{folder.name}",
        nbytes=sum(file.stat().st_size for file in folder.rglob("*.safetensors")),
        prompts=tuple(_labels(settings)),
        rows=tuple(rows),
        reference_score=_score(reference.pictures, prompts),
        noise_floor_psnr_db=reference.noise_floor_psnr_db,
    )
    return model, ModelPictures(reference.pictures, candidates)


def _run_type(
    folder: Path,
    name: str,
    settings: ImageSettings,
    reference: Reference,
    options: argparse.Namespace,
) -> tuple[DemoRow, tuple]:
    started = time.monotonic()
    kind = type_named(name)
    container = next(iter(kind.dialects))
    out = options.out / "files" / f"{folder.name}-{name.upper()}{SUFFIX[container]}"
    job = run_job(
        folder, out, Request(container=container_for(out), type=kind), workers=options.threads
    )
    image, pictures, _ = compare_pictures(out, folder, settings, reference=reference)
    prompts = [prompt for prompt in settings.prompts for _ in settings.seeds]
    row = DemoRow(
        type=name,
        path=str(out.relative_to(options.out)),
        nbytes=out.stat().st_size,
        bits_per_weight=job.bits_per_weight,
        weight_error=job.error,
        psnr_db=image.psnr_db,
        identical=image.identical,
        ssim=image.ssim,
        prompt_score=_score(pictures.candidate, prompts),
        control_psnr_db=image.control_psnr_db,
        noise_floor_psnr_db=image.noise_floor_psnr_db,
        seconds=time.monotonic() - started,
        verdict=worst_of([job.verdict or "pass", image.verdict]),
        stored=_stored(job),
        note="; ".join(
            [
                *(["the file holds the denoiser only"] if container == "gguf" else []),
                *job.warnings,
                *image.problems,
            ]
        ),
    )
    return row, pictures.candidate


def _labels(settings: ImageSettings) -> list[str]:
    if len(settings.seeds) == 1:
        return list(settings.prompts)
    return [f"{prompt}, seed {seed}" for prompt in settings.prompts for seed in settings.seeds]


def _score(pictures: tuple, prompts: list[str]) -> float:
    found = [scorers.score(one, text).total for one, text in zip(pictures, prompts, strict=True)]
    return sum(found) / len(found)


def _stored(job: JobReport) -> str:
    denoiser = next(part for part in job.parts if part.name == "denoiser")
    rows = sorted(denoiser.formats.items(), key=lambda row: -row[1])
    return ", ".join(f"{fmt} {count / denoiser.parameters:.0%}" for fmt, count in rows[:3])


def _print_table(model: DemoModel) -> None:
    print()
    print(f"{model.name}: the original scores {number_text(model.reference_score, 3)}; "
          f"noise floor {decibel_text(model.noise_floor_psnr_db)}")  # fmt: skip
    table(
        (
            "type",
            "size",
            "bits",
            "weight error",
            "PSNR",
            "SSIM",
            "score",
            "control",
            "verdict",
            "stored",
        ),
        [
            (
                row.type,
                size_text(row.nbytes),
                f"{row.bits_per_weight:.2f}",
                number_text(row.weight_error, 4),
                decibel_text(row.psnr_db, identical=row.identical),
                number_text(row.ssim, 4),
                number_text(row.prompt_score, 3),
                decibel_text(row.control_psnr_db),
                row.verdict,
                row.stored,
            )
            for row in model.rows
        ],
        right=(1, 2, 3, 4, 5, 6, 7),
    )
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
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
