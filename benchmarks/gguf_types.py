"""What does each GGUF type weigh and lose on a demo checkpoint? The table of docs/formats.md.

python benchmarks/gguf_types.py [--model examples/flux1-shapes] [--types q4_k_s,iq4_xs]
    [--steps 12] [--json FILE]

Each type is written as its users get it (published mix, default target) and draws the demo prompts;
PSNR is against the source's pictures in float32, squared error pooled over all of them. Types that
cannot do without an importance matrix are given one measured on other prompts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.io.importance import ImportanceMatrix
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import TYPES, type_named
from diffquant.runtime.calibrate import calibrate
from diffquant.runtime.judges import Pooled
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.scorers import DEMO_PROMPTS, random_prompts

GGUF = [row.name for row in TYPES.values() if "gguf" in row.dialects and row.base != "f32"]


def pictures(model: Path, base: Path, steps: int) -> list[np.ndarray]:
    found = open_pipeline(model, base=base)
    width, height = found.size
    made = (
        found.pipeline.generate(prompt, seed=0, steps=steps, width=width, height=height)
        for prompt in DEMO_PROMPTS
    )
    return [one.images[0].numpy() for one in made]


def measured(model: Path) -> ImportanceMatrix:
    return calibrate(model, random_prompts(8, seed=1), steps=8, seed=100).matrix


def needs_matrix(name: str) -> bool:
    return any(FORMATS[one].importance == "required" for one in type_named(name).formats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("examples/flux1-shapes"))
    parser.add_argument("--types", default=",".join(GGUF))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model: Path = arguments.model
    rows: dict[str, dict[str, Any]] = {}
    print(f"{'type':8} {'bits/weight':>11} {'MiB':>6} {'error':>7} {'PSNR dB':>8}")
    with tempfile.TemporaryDirectory() as name:
        folder, matrix = Path(name), None
        expected = pictures(model, model, arguments.steps)
        for kind in arguments.types.split(","):
            if needs_matrix(kind) and matrix is None:
                matrix = measured(model)
            out = folder / "out.gguf"
            report = run_job(
                model,
                out,
                Request("gguf", type=type_named(kind)),
                force=True,
                matrix=matrix if needs_matrix(kind) else None,
            )
            pooled = Pooled()
            for left, right in zip(expected, pictures(out, model, arguments.steps), strict=True):
                pooled.add(left, right)
            row = rows[kind] = {
                "bits_per_weight": report.bits_per_weight,
                "mib": report.nbytes / 2**20,
                "error": report.error,
                "psnr_db": pooled.psnr_db,
                "importance": needs_matrix(kind),
            }
            error = "-" if report.error is None else f"{report.error:.4f}"
            psnr = "same" if pooled.psnr_db is None else f"{pooled.psnr_db:.1f}"
            print(
                f"{kind:8} {row['bits_per_weight']:11.2f} {row['mib']:6.2f} {error:>7} {psnr:>8}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
