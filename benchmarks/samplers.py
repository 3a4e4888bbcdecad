"""How many steps does each sampler need?

    python benchmarks/samplers.py examples/sd15-shapes --cfg 3 --steps 6 10 20 --json samplers.json

On a demo checkpoint, from the same noise: the score of the pictures (do they show what the prompt
asks for), and for samplers that add no noise the distance of their latents to those of Heun in many
steps, relative to the latents' own size. Also model calls and seconds. Schedules may be named
behind the sampler ("dpmpp_2m karras").
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import diffquant
from diffquant.runtime import scorers
from diffquant.runtime.families import Conditions
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.pipeline import Pipeline, initial_noise
from diffquant.runtime.sampler_names import SAMPLER_NAMES, sampler_named
from diffquant.runtime.samplers import SAMPLERS, make_sampler

SIZE, REFERENCE_STEPS = 128, 200


def run(
    pipeline: Pipeline, name: str, steps: int, prompts: list[str], cfg: float
) -> tuple[torch.Tensor, int]:
    """Latents of `prompts`, each from seed 0, and the number of model calls."""
    parts, family = pipeline.parts, pipeline.family
    shape = pipeline._latent_shape(SIZE, SIZE)
    positive = family.encode(parts, prompts, None)
    negative = family.encode(parts, [""] * len(prompts), None) if cfg > 1 else None
    predict = family.predictor(parts, Conditions(positive, negative, cfg, None))
    generators = [torch.Generator().manual_seed(1) for _ in prompts]

    def draw(wanted: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([torch.randn((1, *wanted[1:]), generator=one) for one in generators])

    tokens = shape[1] * shape[2] // family.patch**2
    sampler = make_sampler(
        name, parts.scheduler, steps=steps, tokens=tokens, flow=family.flow, draw=draw
    )
    x = initial_noise(shape, [0] * len(prompts), len(prompts)) * sampler.init_scale
    for index, t in enumerate(sampler.timesteps):
        x = sampler.step(predict(sampler.scale_input(x, index), t), x, index)
    return x, len(sampler.timesteps)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 10, 20])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--samplers", nargs="*")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pipeline = open_pipeline(arguments.model).pipeline
    prompts = list(scorers.DEMO_PROMPTS[: arguments.prompts])
    prefix = "flow_" if pipeline.family.flow else ""
    names = arguments.samplers or [
        row.name for row in SAMPLER_NAMES if prefix + row.name in SAMPLERS
    ]
    wanted, _ = run(pipeline, "heun", REFERENCE_STEPS, prompts, arguments.cfg)
    rows: list[dict[str, Any]] = []
    print(f"| sampler | {' | '.join(f'{steps} steps' for steps in arguments.steps)} |")
    print("|---" * (len(arguments.steps) + 1) + "|")
    for name in names:
        cells = []
        drawing = SAMPLERS[prefix + sampler_named(name).sampler].draws
        for steps in arguments.steps:
            began = time.perf_counter()
            latents, calls = run(pipeline, name, steps, prompts, arguments.cfg)
            seconds = time.perf_counter() - began
            pictures = pipeline.decode(latents)
            scores = [
                scorers.score(picture.numpy(), prompt).total
                for picture, prompt in zip(pictures, prompts, strict=True)
            ]
            far = float((latents - wanted).norm() / wanted.norm())
            rows.append(
                {
                    "sampler": name,
                    "steps": steps,
                    "calls": calls,
                    "seconds": round(seconds, 3),
                    "score": sum(scores) / len(scores),
                    "distance": None if drawing else far,
                }
            )
            shown = "" if drawing else f", {far:.3f}"
            cells.append(f"{rows[-1]['score']:.2f}{shown}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if arguments.json:
        facts = {
            "model": arguments.model.name,
            "cfg": arguments.cfg,
            "prompts": prompts,
            "reference": f"heun, {REFERENCE_STEPS} steps",
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "diffquant": diffquant.__version__,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
