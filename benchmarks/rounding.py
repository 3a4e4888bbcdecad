"""What do scale search and error feedback gain at equal bytes? Weights, layer outputs, pictures.

python benchmarks/rounding.py [--model examples/flux1-shapes] [--types nf4,nvfp4] [--json F]

For every type the denoiser is packed three times, to the same number of bytes: rounded to the
nearest (the bytes other programs write), with searched scales, and by feedback with statistics of
inputs that were measured on other prompts than those the pictures are made of. Per file:

- error: relative RMSE of the packed weights;
- output: sqrt(tr(E H E^T) / tr(W H W^T)) over the layers measured, the error of their outputs on
  the inputs of calibration;
- psnr: pictures against the source's, float32, squared error pooled over all of them; the gain is
  over nearest, with a 95 % bootstrap interval over the same pairs of pictures;
- s: to write the file, without verification, one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request, make_plan
from diffquant.io.inputs import InputsFile, open_inputs, write_inputs
from diffquant.quant.rounding.feedback import carry_of
from diffquant.quant.types import type_named
from diffquant.runtime.calibrate import calibrate
from diffquant.runtime.judges import Pooled
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.scorers import DEMO_PROMPTS, random_prompts

TYPES = "nf4,nf4_dq,fp4,fp4_dq,nvfp4,mxfp8,fp8_scaled,int8_rowwise,int8_tensor"
MODES = ("nearest", "search", "feedback")


def pictures(model: Path, base: Path, prompts: Sequence[str], steps: int) -> list[np.ndarray]:
    """One picture per prompt."""
    found = open_pipeline(model, base=base)
    width, height = found.size
    return [
        found.pipeline.generate(prompt, seed=index, steps=steps, width=width, height=height)
        .images[0]
        .numpy()
        for index, prompt in enumerate(prompts)
    ]


def errors(source: Path, packed: Path, request: Request, inputs: InputsFile) -> tuple[float, float]:
    """Relative RMSE of the quantized weights, and of the outputs of the layers measured."""
    total = np.zeros(4)
    with opened(source) as (_, before, match), opened(packed) as (_, after, _):
        for step in make_plan(before, match, request).steps:
            if not step.decision.format or step.key not in inputs.columns:
                continue
            pieces = step.assignment.pieces
            weight = np.concatenate([before.read(p.key, (p.start, p.stop)) for p in pieces])
            weight = weight.reshape(len(weight), -1)
            found = after.read(step.target).reshape(weight.shape)
            wrong = (found.astype(np.float64) - weight) ** 2
            costs = carry_of(inputs.covariance(step.key)).costs(weight, found)
            total += (wrong.sum(), (weight.astype(np.float64) ** 2).sum(), *costs)
    return float(np.sqrt(total[0] / total[1])), float(np.sqrt(total[2] / total[3]))


def gain_interval(before: Pooled, after: Pooled) -> tuple[float, float]:
    """95 % bootstrap interval of the gain in dB over the same pairs."""
    a, b = np.array(before.each), np.array(after.each)
    picks = np.random.default_rng(0).integers(0, a.size, (4000, a.size))
    gains = 10 * np.log10(a[picks].mean(1) / b[picks].mean(1))
    low, high = np.quantile(gains, (0.025, 0.975))
    return float(low), float(high)


def measure(
    model: Path,
    name: str,
    inputs: InputsFile,
    reference: Sequence[np.ndarray],
    prompts: Sequence[str],
    steps: int,
) -> dict[str, Any]:
    """All files of one type."""
    rows: dict[str, Any] = {}
    pooled: dict[str, Pooled] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            request = Request("safetensors", type=type_named(name), rounding=mode)
            out = Path(folder) / f"{mode}.safetensors"
            given = inputs if mode == "feedback" else None
            run_job(model, out, request, inputs=given, verify="none", workers=1)  # compile
            started = time.perf_counter()
            run_job(model, out, request, inputs=given, verify="none", workers=1, force=True)
            seconds = time.perf_counter() - started
            found = pooled[mode] = Pooled()
            made = pictures(out, model, prompts, steps)
            for one, other in zip(reference, made, strict=True):
                found.add(one, other)
            plain = Request("safetensors", type=type_named(name))
            error, output = errors(model, out, plain, inputs)
            rows[mode] = {
                "nbytes": out.stat().st_size,
                "error": error,
                "output": output,
                "psnr_db": found.psnr_db,
                "gain_db": found.psnr_db - pooled["nearest"].psnr_db,
                "gain_interval_db": gain_interval(pooled["nearest"], found),
                "seconds": seconds,
            }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("examples/flux1-shapes"))
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--prompts", type=int, default=16, help="to calibrate with")
    parser.add_argument("--pictures", type=int, default=16, help="to compare")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # The damping was chosen with the demo prompts: neither side has them.
    drawn = [one for one in random_prompts(300, seed=1) if one not in DEMO_PROMPTS]
    held_out = drawn[-arguments.pictures :]
    prompts = drawn[: arguments.prompts]
    made = calibrate(arguments.model, prompts, steps=arguments.steps, seed=1000, moments=True)
    reference = pictures(arguments.model, arguments.model, held_out, arguments.steps)
    found = {}
    print(f"| {arguments.model.name} | rounding | error | output | psnr (dB) | gain (dB) | s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.safetensors"
        write_inputs(path, made.inputs, {"diffquant.architecture": made.architecture})
        with open_inputs(path) as inputs:
            for name in filter(None, arguments.types.split(",")):
                found[name] = measure(
                    arguments.model, name, inputs, reference, held_out, arguments.steps
                )
                for mode, row in found[name].items():
                    low, high = row["gain_interval_db"]
                    print(
                        f"| {name} | {mode} | {row['error']:.4f} | {row['output']:.4f} "
                        f"| {row['psnr_db']:.2f} | {row['gain_db']:+.2f} ({low:+.2f} to "
                        f"{high:+.2f}) | {row['seconds']:.2f} |",
                        flush=True,
                    )
    if arguments.json:
        settings = {
            "model": str(arguments.model),
            "calls": made.calls,
            "prompts": prompts,
            "held_out": held_out,
            "steps": arguments.steps,
            "python": platform.python_version(),
        }
        arguments.json.write_text(json.dumps({"settings": settings, "types": found}, indent=2))


if __name__ == "__main__":
    main()
