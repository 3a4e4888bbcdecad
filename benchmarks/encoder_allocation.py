"""Do formats chosen by weight error give text encoders better pictures at equal bytes?

python benchmarks/encoder_allocation.py examples/flux1-shapes text_encoder_2 [--pictures 32]

A text encoder's GGUF is written by type, then with `--max-size` of that file; the denoiser stays as
it is. Pictures, intervals and prompts are those of benchmarks/allocation.py.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from allocation import BATCH, SETTINGS, interval

from diffquant.convert.allocation import allocate_bits
from diffquant.convert.budgets import Budget
from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import UsageError
from diffquant.quant.types import type_named
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.scorers import DEMO_PROMPTS, random_prompts


def draw(model: Path, added: dict[str, Path], prompts: list[str], steps: int) -> np.ndarray:
    """(pictures, H, W, 3); picture i starts from seed 20000 + i."""
    opened = open_pipeline(model, added=added)
    width, height = opened.size
    settings = SETTINGS.get(model.name.split("-")[0], {})
    made = []
    for start in range(0, len(prompts), BATCH):
        found = opened.pipeline.generate(
            tuple(prompts[start : start + BATCH]),
            seed=20000 + start,
            steps=steps,
            width=width,
            height=height,
            **settings,
        )
        made.append(found.images.numpy())
    return np.concatenate(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("part")
    parser.add_argument("--types", default="q4_k_m,q3_k_m,q2_k")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    drawn = [one for one in random_prompts(400, seed=77) if one not in DEMO_PROMPTS]
    prompts = drawn[: arguments.pictures]
    exact = draw(arguments.model, {}, prompts, arguments.steps)
    request = Request("gguf", parts=(arguments.part,))
    print("| model, part | type | bytes | PSNR (dB) | allocated, bytes | gain (dB) |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.types.split(","):
            errors, sizes = [], []
            for what in ("published", "allocated"):
                out = Path(folder) / f"{name}-{what}.gguf"
                asked = Request("gguf", type=type_named(name), parts=(arguments.part,))
                if sizes:
                    budget = Budget("file", sizes[0], f"--max-size {sizes[0]}")
                    try:
                        asked = allocate_bits(arguments.model, request, budget).request
                    except UsageError as error:
                        print(f"| {arguments.model.name}, {arguments.part} | {name} | {error} |")
                        break
                run_job(arguments.model, out, asked, verify="none")
                made = draw(arguments.model, {arguments.part: out}, prompts, arguments.steps)
                errors.append(((made - exact) ** 2).mean((1, 2, 3)))
                sizes.append(out.stat().st_size)
            if len(errors) < 2:
                continue
            first, then = (float(-10 * np.log10(one.mean())) for one in errors)
            low, high = interval(*errors, decibel=True)
            print(
                f"| {arguments.model.name}, {arguments.part} | {name} | {sizes[0]} | {first:.2f} | "
                f"{sizes[1]} | {then - first:+.2f} ({low:+.2f} to {high:+.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
