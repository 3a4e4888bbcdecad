"""Do measured sensitivities give better pictures at equal bytes than the published mixes?

python benchmarks/allocation.py [--model examples/flux1-shapes] [--types q4_k_m,q3_k_m,q2_k]
    [--rows published,pictures,...] [--pictures 64] [--steps 10] [--json F]

Per type a published GGUF is written; then files of at most its size whose formats are chosen by

- weights: relative weight errors, what `quantize --max-size` has without a measurement;
- pictures: `calibrate --sensitivity` on other prompts than those the pictures are compared on;
- matrix: published, with an importance matrix; pictures+matrix: both;
- small: pictures+matrix, among formats below q2_k too, which need the matrix;
- weights free, pictures free: the same with --free-kept, for layers that types keep as well.
- gradients instead of matrix: the matrix of `calibrate --importance gradients`.

A size that nothing smaller than the published file fits has no row but says so.

Pictures of the source and of every file are made in batches, float32; squared error and FLIP are
per picture, intervals are 95 % bootstrap over the same pairs. `predicted` is the sum of the
measured sensitivity's errors: the mean squared error it expects. The last line has Spearman's
correlation of predicted and measured error over all files; the median picture leaves those out that
turn into another one.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flip_evaluator
import numpy as np
import torch
from scipy.stats import spearmanr

from diffquant.convert.allocation import allocate_bits
from diffquant.convert.budgets import Budget
from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.convert.sensitivity import Sensitivity, read_sensitivity, write_sensitivity
from diffquant.core.errors import UsageError
from diffquant.io.importance import ImportanceMatrix
from diffquant.quant.types import type_named
from diffquant.runtime.calibrate import calibrate
from diffquant.runtime.differentiate import differentiate_pictures, gradient_importance
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.pricing import AMONG
from diffquant.runtime.scorers import DEMO_PROMPTS, random_prompts
from diffquant.runtime.sensitivity import price_formats

# What the checkpoints' own cards were judged with, as in scripts/demo_run.py.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "sd15": {"cfg": 3.0, "sampler": "ddim"},
    "sdxl": {"cfg": 3.0},
}
BATCH = 16
NAMES = (
    "published", "weights", "weights free", "pictures", "pictures free",
    "published+matrix", "pictures+matrix", "small+matrix",
    "published+gradients", "pictures+gradients", "small+gradients",
)  # fmt: skip
SMALL = ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", *AMONG)


@dataclass(frozen=True)
class Bench:
    """What all files of a run share."""

    model: Path
    prompts: Sequence[str]
    steps: int
    settings: Mapping[str, Any]
    priced: Mapping[str, Path]  # sensitivities, by what is encoded with
    matrices: Mapping[str, ImportanceMatrix | None]
    reference: np.ndarray


def draw(
    model: Path, base: Path, prompts: Sequence[str], steps: int, settings: Mapping[str, Any]
) -> np.ndarray:
    """(pictures, H, W, 3); picture i starts from seed 20000 + i."""
    opened = open_pipeline(model, base=base)
    width, height = opened.size
    made = []
    for start in range(0, len(prompts), BATCH):
        some = tuple(prompts[start : start + BATCH])
        found = opened.pipeline.generate(
            some, seed=20000 + start, steps=steps, width=width, height=height, **settings
        )
        made.append(found.images.numpy())
    return np.concatenate(made)


def interval(before: np.ndarray, after: np.ndarray, *, decibel: bool) -> tuple[float, float]:
    """95 % of the gain in dB, or of the relative change, of means over the same pairs."""
    picks = np.random.default_rng(0).integers(0, len(before), (2000, len(before)))
    ratio = before[picks].mean(1) / after[picks].mean(1)
    values = 10 * np.log10(ratio) if decibel else 1 / ratio - 1
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def predicted(found: Sensitivity, formats: Mapping[str, str]) -> float:
    """Summed errors of the tensors that were measured."""
    errors = found.errors
    return sum(errors[key].get(fmt, 0.0) for key, fmt in formats.items() if key in errors)


def write(bench: Bench, name: str, kind: str, budget: int, out: Path) -> dict[str, str]:
    """Write one file; its formats by canonical key."""
    how, _, weighed = name.partition("+")
    how, _, free = how.partition(" ")
    matrix = bench.matrices[weighed]
    request = Request("gguf", type=type_named(kind))
    if how != "published":
        sensitivity = None if how == "weights" else bench.priced[weighed]
        among = SMALL if how == "small" else ()
        asked = Budget("file", budget, f"--max-size {budget}", among, bool(free))
        allocated = allocate_bits(
            bench.model, Request("gguf"), asked, sensitivity=sensitivity, matrix=matrix
        )
        request = allocated.request
    job = run_job(bench.model, out, request, matrix=matrix, verify="none")
    return {row.key: row.stored for row in job.tensors}


def measure(bench: Bench, kind: str, names: Sequence[str]) -> dict[str, Any]:
    """All files of one type."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            out = Path(folder) / f"{name}.gguf"
            budget = rows["published"]["nbytes"] if rows else 0
            try:
                formats = write(bench, name, kind, budget, out)
            except UsageError as error:
                print(f"| {kind} | {name} | none: {error} |", flush=True)
                continue
            made = draw(out, bench.model, bench.prompts, bench.steps, bench.settings)
            pairs = zip(bench.reference, made, strict=True)
            flip = [float(flip_evaluator.evaluate(a, b, "LDR")[1]) for a, b in pairs]
            squared = ((made - bench.reference) ** 2).mean((1, 2, 3))
            known = read_sensitivity(bench.priced[name.partition("+")[2]])
            rows[name] = {
                "nbytes": out.stat().st_size,
                "mse": squared.tolist(),
                "flip": flip,
                "psnr_db": float(-10 * np.log10(squared.mean())),
                "predicted": predicted(known, formats),
                "formats": formats,
            }
            first, row = rows["published"], rows[name]
            mse = np.array(first["mse"]), squared
            row["gain_db"] = row["psnr_db"] - first["psnr_db"]
            row["gain_interval_db"] = interval(*mse, decibel=True)
            row["flip_change"] = float(np.mean(flip) / np.mean(first["flip"]) - 1)
            flips = np.array(first["flip"]), np.array(flip)
            row["flip_interval"] = interval(*flips, decibel=False)
            told(kind, name, row)
    return rows


def told(kind: str, name: str, row: Mapping[str, Any]) -> None:
    """One row of the table."""
    low, high = row["gain_interval_db"]
    less, more = row["flip_interval"]
    print(
        f"| {kind} | {name} | {row['nbytes']} | {row['psnr_db']:.2f} | {row['gain_db']:+.2f} "
        f"({low:+.2f} to {high:+.2f}) | {np.mean(row['flip']):.4f} | {row['flip_change']:+.0%} "
        f"({less:+.0%} to {more:+.0%}) | {-10 * np.log10(row['predicted']):.1f} dB |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("examples/flux1-shapes"))
    parser.add_argument("--types", default="q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--rows", default=",".join(NAMES), help="published is always made")
    parser.add_argument("--prompts", type=int, default=24, help="to measure with")
    parser.add_argument("--pictures", type=int, default=64, help="to compare")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = ["published", *(n for n in NAMES[1:] if n in arguments.rows.split(","))]
    torch.set_num_threads(1)
    drawn = [one for one in random_prompts(400, seed=77) if one not in DEMO_PROMPTS]
    held, prompts = drawn[: arguments.pictures], drawn[100 : 100 + arguments.prompts]
    settings = SETTINGS.get(arguments.model.name.split("-")[0], {})
    how: dict[str, Any] = {**settings, "steps": arguments.steps, "seed": 5000}
    with tempfile.TemporaryDirectory() as folder:
        made = calibrate(arguments.model, prompts, **how)
        found = differentiate_pictures(arguments.model, prompts, **how)
        matrices = {
            "": None,
            "matrix": made.matrix,
            "gradients": gradient_importance(found, made.matrix),
        }
        priced = {name: Path(folder) / f"{name or 'plain'}.json" for name in matrices}
        for name, matrix in matrices.items():
            prices = price_formats(
                arguments.model,
                found,
                AMONG if matrix is None else SMALL,
                matrix=matrix,
                everywhere=True,
                context={},
            )
            write_sensitivity(priced[name], prices.sensitivity)
        reference = draw(arguments.model, arguments.model, held, arguments.steps, settings)
        bench = Bench(arguments.model, held, arguments.steps, settings, priced, matrices, reference)
        print(
            f"| {arguments.model.name} | chosen by | bytes | PSNR (dB) | gain (dB) | FLIP | ",
            end="",
        )
        print("change | predicted |\n|---|---|---|---|---|---|---|---|")
        rows = {kind: measure(bench, kind, names) for kind in arguments.types.split(",")}
    every = [row for found in rows.values() for row in found.values()]
    rank = spearmanr([r["predicted"] for r in every], [np.mean(r["mse"]) for r in every]).statistic
    middle = spearmanr([r["predicted"] for r in every], [np.median(r["mse"]) for r in every])
    print(f"Spearman of predicted and measured error over {len(every)} files: {rank:.3f}, ", end="")
    print(f"with the median picture {middle.statistic:.3f}")
    if arguments.json:
        facts = {
            "model": arguments.model.name,
            "steps": arguments.steps,
            "prompts": len(prompts),
            "held": len(held),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "spearman": float(rank),
        }
        arguments.json.write_text(json.dumps({"settings": facts, "types": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
