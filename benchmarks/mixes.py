"""Which mix gives better pictures at equal bytes? Rows of `--policy tuned` are judged here.

python benchmarks/mixes.py examples/flux1-shapes q4_k_s q4_k_m 'q4_k_s+img_mlp.2=q5_k' ...

A candidate is TYPE[+REGEX=FORMAT...]; `q4_k_s/tuned` takes the policy. Each is written as GGUF and
generates the same pictures as the source in float32; PSNR is pooled over all prompts and seeds. The
step error is that of one denoiser call, averaged over the first calls of every picture: it does not
grow along the trajectory, so it tells small differences apart where the pictures' PSNR is noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.quant.policy import Rule
from diffquant.quant.types import type_named
from diffquant.runtime.compare import DEFAULT_PROMPTS, ImageSettings, Pooled
from diffquant.runtime.opening import open_pipeline


class Recorder:
    """Keeps the first calls of a denoiser: inputs and outputs."""

    def __init__(self, module: torch.nn.Module, limit: int) -> None:
        self.calls: list[tuple[tuple, dict, torch.Tensor]] = []
        self.limit = limit
        self.handle = module.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, _module: object, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
        if len(self.calls) < self.limit:
            self.calls.append((args, kwargs, out.clone()))


def request_of(text: str, target: str) -> Request:
    name, *rules = text.split("+")
    name, _, policy = name.partition("/")
    pairs = [rule.rpartition("=")[::2] for rule in rules]
    return Request(
        "gguf",
        type=type_named(name),
        target=target,
        policy=policy or "published",
        rules=tuple(Rule(pattern, fmt or None, "benchmark") for pattern, fmt in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("candidates", nargs="+")
    parser.add_argument("--target", default="")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = ImageSettings(prompts=DEFAULT_PROMPTS, seeds=tuple(range(arguments.seeds)))
    source = open_pipeline(arguments.source, dtype=torch.float32, device="cpu")
    width, height = source.size

    def generate(side) -> list:
        return [
            side.pipeline.generate(
                prompt,
                seed=seed,
                steps=arguments.steps,
                cfg=settings.cfg,
                guidance=settings.guidance,
                sampler=settings.sampler,
                width=width,
                height=height,
            ).images[0].numpy()
            for prompt in settings.prompts
            for seed in settings.seeds
        ]  # fmt: skip

    recorder = Recorder(source.pipeline.parts.denoiser, 64)
    exact = generate(source)
    recorder.handle.remove()
    rows = []
    print(f"{'candidate':60} {'bits':>6} {'MiB':>7} {'step error':>10} {'PSNR dB':>8}")
    for text in arguments.candidates:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "candidate.gguf"
            job = run_job(arguments.source, out, request_of(text, arguments.target))
            mine = open_pipeline(out, base=arguments.source, dtype=torch.float32, device="cpu")
            squared = norm = 0.0
            with torch.no_grad():
                for args, kwargs, expected in recorder.calls:
                    got = mine.pipeline.parts.denoiser(*args, **kwargs)
                    squared += float(((got - expected) ** 2).sum())
                    norm += float((expected**2).sum())
            pooled = Pooled()
            for one, other in zip(exact, generate(mine), strict=True):
                pooled.add(one, other)
        row = {
            "candidate": text,
            "bits_per_weight": job.bits_per_weight,
            "nbytes": job.nbytes,
            "step_error": (squared / norm) ** 0.5,
            "psnr_db": pooled.psnr_db,
        }
        rows.append(row)
        print(
            f"{text:60} {row['bits_per_weight']:6.3f} {job.nbytes / 2**20:7.3f} "
            f"{row['step_error']:10.5f} {row['psnr_db']:8.2f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"source": arguments.source.name, "rows": rows}))


if __name__ == "__main__":
    main()
