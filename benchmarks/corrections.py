"""What do an error LoRA and bias correction give, in weights and in pictures, and at what cost?

python benchmarks/corrections.py examples/flux1-shapes [examples/sd15-shapes ...]
    [--types nf4,nvfp4,q4_k_s] [--ranks 8,32] [--steps 8] [--seeds 2] [--json FILE]

Statistics of layer inputs come from prompts that no picture here is judged by. Each candidate
generates the same pictures as its source in float32: PSNR is pooled over all prompts and seeds. The
step error, relative, is that of one denoiser call on the source's own inputs, over the first 32
calls: it does not grow along the trajectory, so it tells apart what pictures drown in noise. The
weight error is over the packed layers that a LoRA reaches. `x/inputs` is a LoRA weighed by the
covariance of inputs, `x/imatrix` by their mean squares; there, types of ggml round by them as well:
`no LoRA/imatrix` shows that alone.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch

from diffquant.convert.job_report import JobReport
from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.io.inputs import open_inputs, write_inputs
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import type_named
from diffquant.runtime.calibrate import calibrate
from diffquant.runtime.compare import Pooled
from diffquant.runtime.lora import attach
from diffquant.runtime.opening import Opened, open_pipeline

CALIBRATION = (
    "a large green square on a white background at the top",
    "a small yellow star on a purple background in the center",
    "a large blue cross on an orange background at the right",
    "a small black triangle on a red background at the bottom",
    "a large white circle on a green background at the left",
    "a small orange cross on a black background at the top",
    "a large purple star on a yellow background at the bottom",
    "a small blue square on a white background at the right",
)
HELD_OUT = (
    "a small red circle on a blue background at the left",
    "a large yellow triangle on a black background in the center",
    "a small white star on a green background at the right",
    "a large orange square on a purple background at the top",
)
CONTAINER = {"safetensors": ".safetensors", "gguf": ".gguf"}
CALLS = 32


class Judge:
    """The source's pictures and first denoiser calls, and how far another side is from them."""

    def __init__(self, source: Path, steps: int, seeds: int) -> None:
        self.source, self.steps, self.seeds = source, steps, seeds
        self.calls: list[tuple[tuple, dict, torch.Tensor]] = []
        side = open_pipeline(source, dtype=torch.float32, device="cpu")
        handle = side.pipeline.parts.denoiser.register_forward_hook(self._keep, with_kwargs=True)
        self.exact = self._generate(side)
        handle.remove()

    def _keep(self, _module: object, args: tuple, kwargs: dict, out: torch.Tensor) -> None:
        if len(self.calls) < CALLS:
            self.calls.append((args, kwargs, out.clone()))

    def _generate(self, side: Opened) -> list:
        width, height = side.size
        return [
            side.pipeline.generate(
                prompt, seed=seed, steps=self.steps, width=width, height=height
            ).images[0].numpy()
            for prompt in HELD_OUT
            for seed in range(self.seeds)
        ]  # fmt: skip

    def judge(self, out: Path, lora: Path | None) -> tuple[float, float]:
        """Step error and PSNR."""
        side = open_pipeline(out, base=self.source, dtype=torch.float32, device="cpu")
        if lora is not None:
            attach(side, ((lora, 1.0),))
        squared = norm = 0.0
        with torch.no_grad():
            for args, kwargs, expected in self.calls:
                got = side.pipeline.parts.denoiser(*args, **kwargs)
                squared += float(((got - expected) ** 2).sum())
                norm += float((expected**2).sum())
        pooled = Pooled()
        for one, other in zip(self.exact, self._generate(side), strict=True):
            pooled.add(one, other)
        return (squared / norm) ** 0.5, pooled.psnr_db or math.inf


def candidates(ranks: list[int], *, weighs: bool) -> list[tuple[str, int, str, bool]]:
    """(label, rank, what weighs it, bias correction); `weighs`: the type's own rounding can too."""
    plain = [("plain", 0, "", False), ("bias", 0, "inputs", True)]
    plain += [("no LoRA/imatrix", 0, "imatrix", False)] if weighs else []
    loras = [
        (f"lora {rank}{'/' if weigh else ''}{weigh}", rank, weigh, False)
        for rank in ranks
        for weigh in ("", "imatrix", "inputs")
    ]
    return plain + loras


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--types", default="nf4,nvfp4,q4_k_s")
    parser.add_argument("--ranks", default="8,32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ranks = [int(rank) for rank in arguments.ranks.split(",")]
    rows: list[dict[str, object]] = []
    print("| model | type | correction | MiB | LoRA | weight error | step error | dB | PSNR | dB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for source in arguments.sources:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(source, Path(folder), arguments, ranks)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


def measure(
    source: Path, folder: Path, arguments: argparse.Namespace, ranks: list[int]
) -> list[dict[str, object]]:
    made = calibrate(source, CALIBRATION, seed=1000, steps=arguments.steps, moments=True)
    statistics = folder / "inputs.safetensors"
    write_inputs(statistics, made.inputs, {"diffquant.architecture": made.architecture})
    judge = Judge(source, arguments.steps, arguments.seeds)
    rows = []
    for name in arguments.types.split(","):
        kind = type_named(name)
        container = next(one for one in CONTAINER if one in kind.dialects)
        weighs = any(FORMATS[one].importance != "unused" for one in kind.formats)
        base: tuple[float, float] | None = None
        for label, rank, weigh, bias in candidates(ranks, weighs=weighs):
            out, lora = folder / f"out{CONTAINER[container]}", folder / "lora.safetensors"
            request = Request(container, type=kind, lora_rank=rank, bias_correction=bias)
            started = time.perf_counter()
            with open_inputs(statistics) as inputs:
                job = run_job(
                    source,
                    out,
                    request,
                    force=True,
                    matrix=made.matrix if weigh == "imatrix" else None,
                    inputs=inputs if weigh == "inputs" else None,
                    error_lora=lora if rank else None,
                )
            seconds = time.perf_counter() - started
            step, psnr = judge.judge(out, lora if rank else None)
            base = base or (step, psnr)
            row = row_of(source.name, name, label, job, seconds, step, psnr, base)
            rows.append(row)
            print("| " + " | ".join(shown(row)) + " |", flush=True)
    return rows


def row_of(
    model: str,
    name: str,
    label: str,
    job: JobReport,
    seconds: float,
    step: float,
    psnr: float,
    base: tuple[float, float],
) -> dict[str, object]:
    lora = job.error_lora
    return {
        "model": model,
        "type": name,
        "correction": label,
        "nbytes": job.nbytes,
        "lora_nbytes": lora.nbytes if lora else 0,
        "weight_error": lora.corrected_error if lora else job.error,
        "outputs_gain_db": lora.weighed_gain_db if lora else None,
        "step_error": step,
        "step_gain_db": 20 * math.log10(base[0] / step),
        "psnr_db": psnr,
        "psnr_gain_db": psnr - base[1],
        "seconds": seconds,
    }


def shown(row: dict[str, object]) -> list[str]:
    return [
        str(row["model"]),
        str(row["type"]),
        str(row["correction"]),
        f"{row['nbytes'] / 2**20:.2f}",
        f"{row['lora_nbytes'] / 2**20:.2f}",
        f"{row['weight_error']:.4f}",
        f"{row['step_error']:.4f}",
        f"{row['step_gain_db']:+.1f}",
        f"{row['psnr_db']:.1f}",
        f"{row['psnr_gain_db']:+.1f}",
    ]


if __name__ == "__main__":
    main()
