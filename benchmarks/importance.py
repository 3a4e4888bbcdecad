"""What does an importance matrix gain? Files with and without, weights and pictures compared.

python benchmarks/importance.py [--model examples/flux1-shapes] [--formats q4_k,iq4_xs] [--json F]

For every format with a weighted encoder the denoiser is packed twice, `--pure`: without a matrix
(formats that need one: with the same value in every column) and with one measured on other prompts
than those the pictures are compared on. Per file:

- error: relative RMSE of the packed weights, every weight alike;
- weighted: the same with every column's squared error and square multiplied by its mean squared
  input, which is the error of a layer's output on inputs whose channels are independent;
- psnr: pictures against the source's, float32, squared error pooled over all of them; the JSON has
  a 95 % interval, which is wide: a few pictures decide it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffquant.convert.jobs import opened, run_job
from diffquant.convert.plan import Request, make_plan
from diffquant.io.imatrix import Entry, ImportanceMatrix
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import QuantType
from diffquant.runtime.calibrate import calibrate
from diffquant.runtime.judges import Pooled
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.scorers import DEMO_PROMPTS, random_prompts


def pictures(model: Path, base: Path, steps: int) -> list[np.ndarray]:
    """One picture per demo prompt."""
    found = open_pipeline(model, base=base)
    width, height = found.size
    return [
        found.pipeline.generate(prompt, seed=0, steps=steps, width=width, height=height)
        .images[0]
        .numpy()
        for prompt in DEMO_PROMPTS
    ]


def errors(source: Path, packed: Path, importance: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Relative RMSE of the weights that importance speaks of: plain, and weighted by it."""
    total = np.zeros(4)
    with opened(source) as (_, before, match), opened(packed) as (_, after, _):
        plan = make_plan(before, match, Request("gguf", dtype="f32"))
        for step in plan.steps:
            if step.key not in importance:
                continue
            pieces = step.assignment.pieces
            weight = np.concatenate([before.read(p.key, (p.start, p.stop)) for p in pieces])
            square = weight.astype(np.float64) ** 2
            wrong = (after.read(step.target).astype(np.float64) - weight) ** 2
            columns = importance[step.key].astype(np.float64)
            total += (wrong.sum(), square.sum(), (wrong @ columns).sum(), (square @ columns).sum())
    return float(np.sqrt(total[0] / total[1])), float(np.sqrt(total[2] / total[3]))


def flat(matrix: ImportanceMatrix) -> ImportanceMatrix:
    """The same entries with every column alike."""
    entries = {
        name: Entry(np.ones_like(one.sums), np.ones_like(one.counts))
        for name, one in matrix.entries.items()
    }
    return replace(matrix, entries=entries)


def measure(
    model: Path, name: str, matrix: ImportanceMatrix, reference: Sequence[np.ndarray], steps: int
) -> dict[str, Any]:
    """Both files of one format."""
    kind = QuantType(name, name, {"gguf": "gguf"}, "")
    required = FORMATS[name].importance == "required"
    with opened(model) as (_, logical, match):
        request = Request("gguf", type=kind, pure=True)
        importance = make_plan(logical, match, request, matrix=matrix).importance
    rows: dict[str, Any] = {"bits": FORMATS[name].bits}
    with tempfile.TemporaryDirectory() as folder:
        for label, used in (("without", flat(matrix) if required else None), ("with", matrix)):
            out = Path(folder) / f"{label}.gguf"
            run_job(model, out, request, matrix=used, verify="none")
            pooled = Pooled()
            for one, other in zip(reference, pictures(out, model, steps), strict=True):
                pooled.add(one, other)
            plain, weighted = errors(model, out, importance)
            rows[label] = {
                "error": plain,
                "weighted": weighted,
                "psnr_db": pooled.psnr_db,
                "interval_db": pooled.interval_db(),
            }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("examples/flux1-shapes"))
    weighed = [name for name, row in FORMATS.items() if row.importance != "unused"]
    parser.add_argument("--formats", default=",".join(weighed))
    parser.add_argument("--prompts", type=int, default=8, help="to calibrate with")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    drawn = random_prompts(arguments.prompts + len(DEMO_PROMPTS), seed=1)
    prompts = [one for one in drawn if one not in DEMO_PROMPTS][: arguments.prompts]
    made = calibrate(arguments.model, prompts, steps=arguments.steps, seed=100)
    reference = pictures(arguments.model, arguments.model, arguments.steps)
    found = {}
    print(f"{'format':8} {'bits':>6}  {'error':>15}  {'weighted error':>15}  {'psnr (dB)':>13}")
    for name in filter(None, arguments.formats.split(",")):
        rows = found[name] = measure(arguments.model, name, made.matrix, reference, arguments.steps)
        a, b = rows["without"], rows["with"]
        print(
            f"{name:8} {rows['bits']:6.3f}  {a['error']:.4f} {b['error']:8.4f}  "
            f"{a['weighted']:.4f} {b['weighted']:8.4f}  {a['psnr_db']:6.2f} {b['psnr_db']:6.2f}",
            flush=True,
        )
    if arguments.json:
        settings = {"calls": made.calls, "prompts": prompts, "steps": arguments.steps}
        arguments.json.write_text(json.dumps({"settings": settings, "formats": found}, indent=2))


if __name__ == "__main__":
    main()
