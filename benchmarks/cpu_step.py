"""One guided step of SD1.5 at real size on the CPU: ours to diffusers, packed to plain.

python benchmarks/cpu_step.py [--json FILE] [--workdir DIR] [--types ...] [--dtypes ...]
                              [--rounds 5] [--pixels 512] [--threads N] [--profile NAME]

Both UNets hold the very same random weights (names and shapes of Stable Diffusion 1.5, written by
packed_unet_memory.py, quantized by the engine, opened as `generate` opens them) and predict noise
for a batch of two, which is what one step with guidance asks for. They take turns in one process,
after a round that is thrown away; a row is the median of its rounds. Asked:

    plain <= 1.05 x diffusers        weights of the compute dtype, nothing to decode
    q8_0 or q4_k_s <= 1.15 x plain

`error` is the relative root mean square difference to the plain output in the same dtype; for
diffusers it is the noise of the compute dtype, where the two order their sums differently. `faults`
are pages the system had to hand out in a step; `least` is the fastest round and `cpu s` the
processor time of all threads, which other work on the machine disturbs less than wall time.
`--workdir` keeps the files for the next run; `--profile NAME` (diffusers, plain or a type) prints
where torch spends one step instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packed_unet_memory import build as write_checkpoint
from peak_memory import environment
from torch import Tensor, nn

from diffquant.convert.binding import bind
from diffquant.convert.detect import detect
from diffquant.convert.jobs import run_job
from diffquant.convert.match import PartMatch, to_diffusers
from diffquant.convert.plan import Request
from diffquant.io import open_source
from diffquant.quant.types import type_named
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.loading import build
from diffquant.runtime.packing import packed_weights

PLAIN_LIMIT, PACKED_LIMIT = 1.05, 1.15
ASKED_OF = ("q8_0", "q4_k_s")
Step = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step is given: latents (2, 4, h, w), timesteps (2,), text states (2, 77, 768)."""

    latents: Tensor
    timesteps: Tensor
    context: Tensor

    @classmethod
    def random(cls, pixels: int, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        side = pixels // 8
        latents = torch.randn(1, 4, side, side, generator=generator).repeat(2, 1, 1, 1)
        context = torch.randn(2, 77, 768, generator=generator)
        return cls(latents.to(dtype), torch.tensor([500.0, 500.0]), context.to(dtype))


def prepare(folder: Path, types: list[str]) -> dict[str, Path]:
    """Write what `folder` does not have yet: the checkpoint, and a file for each type."""
    base = folder / "unet.safetensors"
    if not base.exists():
        write_checkpoint(base)
    paths = {"plain": base}
    for name in types:
        kind = type_named(name)
        container = "gguf" if "gguf" in kind.dialects else "safetensors"
        paths[name] = folder / f"unet-{name}.{container}"
        if not paths[name].exists():
            run_job(base, paths[name], Request(container=container, type=kind), verify="none")
    return paths


def load(path: Path) -> tuple[dict[str, PackedWeight], PartMatch]:
    """The denoiser's weights as they are stored, by canonical key."""
    with open_source(path) as source:
        logical = bind(source)
        part = detect(logical.specs(), source.metadata, source.configs).part("denoiser")
        assert part is not None
        return packed_weights(logical, part), part


def peer(state: dict[str, Tensor], part: PartMatch) -> nn.Module:
    """diffusers' UNet around the same tensors (nothing is copied)."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    named = {}
    for assignment in to_diffusers(part):
        (piece,) = assignment.pieces
        key = piece.key.removeprefix("model.diffusion_model.")
        named[assignment.target] = state[key].reshape(assignment.shape)
    model.load_state_dict(named, assign=True)
    return model.requires_grad_(False).eval()


def steps(
    paths: dict[str, Path], dtype: torch.dtype, inputs: Inputs
) -> Iterator[tuple[str, Step, int]]:
    """Name, one step, and bytes of weights held, of every contender."""
    for name, path in paths.items():
        weights, part = load(path)
        if name == "plain":
            state = {key: weight.dequantize(dtype) for key, weight in weights.items()}
            weights = {key: PackedWeight.of(tensor) for key, tensor in state.items()}
            theirs = peer(state, part)

            def diffusers_step(model: nn.Module = theirs) -> Tensor:
                one = model(inputs.latents, inputs.timesteps, inputs.context, return_dict=False)
                return one[0]

            yield "diffusers", diffusers_step, sum(one.nbytes for one in state.values())
        hyper = {key: one.value for key, one in part.hyper.items()}
        ours = build("unet", weights, hyper, dtype=dtype)

        def our_step(model: nn.Module = ours) -> Tensor:
            return model(inputs.latents, inputs.timesteps, inputs.context)

        yield name, our_step, sum(weight.nbytes for weight in weights.values())


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall time, processor time of all threads, and page faults of one step."""

    seconds: float
    cpu_s: float
    faults: int

    @classmethod
    def of(cls, step: Step) -> Timing:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start, cpu = time.perf_counter(), time.process_time()
        step()
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        return cls(seconds, cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


def measure(
    paths: dict[str, Path], dtype: torch.dtype, arguments: argparse.Namespace
) -> dict[str, Any]:
    inputs = Inputs.random(arguments.pixels, dtype)
    contenders = {name: (step, held) for name, step, held in steps(paths, dtype, inputs)}
    if arguments.profile:
        profile(contenders[arguments.profile][0])
        return {}
    plain = contenders["plain"][0]()
    errors = {name: relative_error(step(), plain) for name, (step, _) in contenders.items()}
    found: dict[str, list[Timing]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, (step, _) in contenders.items():
            found[name].append(Timing.of(step))
    rows = {}
    for name, runs in found.items():
        seconds = [one.seconds for one in runs]
        rows[name] = {
            "seconds": statistics.median(seconds),
            "least_s": min(seconds),
            "spread_s": max(seconds) - min(seconds),
            "cpu_s": statistics.median(one.cpu_s for one in runs),
            "faults": statistics.median(one.faults for one in runs),
            "held_nbytes": contenders[name][1],
            "error": errors[name],
        }
    for row in rows.values():
        row["least_to_plain"] = row["least_s"] / rows["plain"]["least_s"]
        row["cpu_to_plain"] = row["cpu_s"] / rows["plain"]["cpu_s"]
        row["to_diffusers"] = row["seconds"] / rows["diffusers"]["seconds"]
        row["to_plain"] = row["seconds"] / rows["plain"]["seconds"]
    return rows


def profile(step: Step) -> None:
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
    print(table)


def show(name: str, rows: dict[str, Any]) -> None:
    print(
        f"{name:14} {'s':>6} {'least':>6} {'spread':>6} {'cpu s':>6} {'/diffusers':>10} "
        f"{'/plain':>6} {'least':>6} {'cpu':>6} {'held MiB':>9} {'faults':>8} {'error':>9}"
    )
    for one, row in rows.items():
        print(
            f"{one:14} {row['seconds']:6.2f} {row['least_s']:6.2f} {row['spread_s']:6.2f} "
            f"{row['cpu_s']:6.2f} {row['to_diffusers']:10.2f} {row['to_plain']:6.2f} "
            f"{row['least_to_plain']:6.2f} {row['cpu_to_plain']:6.2f} "
            f"{row['held_nbytes'] / 2**20:9.0f} {row['faults']:8.0f} {row['error']:9.2g}"
        )
    ratio = rows["plain"]["to_diffusers"]
    print(f"plain is {ratio:.2f} x diffusers, at most {PLAIN_LIMIT} asked")
    packed = {one: rows[one]["to_plain"] for one in ASKED_OF if one in rows}
    for one, ratio in packed.items():
        print(f"{one} is {ratio:.2f} x plain, at most {PACKED_LIMIT} asked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--types", default="q8_0,q4_k_s,fp8_scaled,int8_rowwise,nf4")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "environment": {**environment(), "threads": arguments.threads},
        "pixels": arguments.pixels,
        "rounds": arguments.rounds,
        "steps": {},
    }
    with contextlib.ExitStack() as stack:
        folder = arguments.workdir
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        paths = prepare(folder, [one for one in arguments.types.split(",") if one])
        for name in arguments.dtypes.split(","):
            with torch.inference_mode():
                rows = measure(paths, getattr(torch, name), arguments)
            if rows:
                report["steps"][name] = rows
                show(name, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
