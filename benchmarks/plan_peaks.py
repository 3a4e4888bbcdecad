"""Are the planner's peaks right? Every family and rung, predicted beside measured, in one table.

python benchmarks/plan_peaks.py [--device cuda|cpu] [--families NAME,...] [--types TYPE,...]
    [--levels LEVEL,...] [--pixels N] [--encoders] [--dtype bfloat16|float32] [--json FILE]

Models of real names and shapes (tests/data/manifests.json.xz), placed as the runtime places files:
the weights' bytes are all one number and are made when they are read, so no file is needed. Each
rung is placed by runtime/memory and its stages run once: the denoiser one step (guided where the
family is), the decoder one picture, with --encoders the text encoders 512 tokens; what streams runs
twice, for the second time has learnt the order. Predicted: plan.peak_nbytes. Measured on CUDA:
torch.cuda.max_memory_allocated, against the prediction without the device's context, and
max_memory_reserved beside it; on a CPU: peak anonymous memory of a process of its own, context and
all. Target: within 15 % of measured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import lzma
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peak_memory import environment, mib, run

MANIFESTS = Path(__file__).parent.parent / "tests" / "data"
LIMIT = 0.15
TOKENS = 512


@dataclass(frozen=True)
class Case:
    """Manifests of a family's parts, hyperparameters that shapes do not tell, its usual picture."""

    denoiser: str
    vae: str
    encoders: tuple[str, ...]
    pixels: int
    guided: bool
    hyper: Mapping[str, Any]


SDXL_HEADS = {"attention_head_dim": (5, 10, 20)}
FAMILIES = {
    "sd15": Case("sd15.unet.ldm", "sd.vae-kl-f8.ldm", ("clip-l.hf",), 512, True, {}),
    "sdxl": Case(
        "sdxl-base.unet.ldm",
        "sd.vae-kl-f8.ldm",
        ("clip-l.hf", "openclip-bigg.open_clip"),
        1024,
        True,
        SDXL_HEADS,
    ),
    "flux1": Case(
        "flux-dev.transformer.original",
        "flux.vae.original",
        ("clip-l.hf", "t5-xxl-encoder.hf"),
        1024,
        False,
        {},
    ),
    "flux2": Case(
        "flux2-klein-4b.transformer.original",
        "flux2.vae.original",
        ("qwen3-4b.hf",),
        1024,
        False,
        {},
    ),
    "z_image": Case(
        "z-image.transformer.comfy", "flux.vae.original", ("qwen3-4b.hf",), 1024, False, {}
    ),
    "qwen_image": Case(
        "qwen-image.transformer.comfy",
        "qwen-image.vae.diffusers",
        ("qwen2.5-vl-7b.hf",),
        1024,
        True,
        {},
    ),
}


class Made:
    """A source whose bytes are all 1, made when they are read."""

    container, metadata, configs, path = "safetensors", {}, {}, Path("made")

    def __init__(self, specs: dict[str, Any]) -> None:
        self.specs = specs

    def read(self, key: str, rows: tuple[int, int] | None = None) -> Any:
        spec = self.specs[key]
        nbytes = spec.nbytes
        if rows is not None:
            nbytes = nbytes // max(spec.rows, 1) * (rows[1] - rows[0])
        return np.full(nbytes, 1, np.uint8)


@functools.cache
def manifests() -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = {}
    for name in ("manifests", "more_manifests"):
        found |= json.loads(lzma.decompress((MANIFESTS / f"{name}.json.xz").read_bytes()))
    return found


def source(name: str, stored: str, *, part: str) -> tuple[Any, Any]:
    """(LogicalSource, PartMatch) of a manifest, its denoiser in a type."""
    from diffquant.convert.binding import bind
    from diffquant.convert.detect import detect, detect_component
    from diffquant.convert.plan import Request, make_plan
    from diffquant.core.tensors import TensorSpec
    from diffquant.quant.types import type_named

    shapes = manifests()[name]
    specs = {key: TensorSpec(key, "BF16", tuple(shape)) for key, shape in shapes.items()}
    logical = bind(Made(specs))
    if part != "denoiser":
        found = detect_component(logical.specs())
        assert found is not None, name
        return logical, found
    match = detect(logical.specs())
    if stored != "bf16":
        steps = make_plan(logical, match, Request("gguf", type=type_named(stored))).part_steps(part)
        packed = {s.key: TensorSpec(s.key, s.stored.upper(), s.assignment.shape) for s in steps}
        logical = bind(Made(packed))
        match = detect(logical.specs())
    found = match.part("denoiser")
    assert found is not None, name
    return logical, found


@dataclass
class Loaded:
    """Parts of a family, stored, and what the planner says of them."""

    modules: dict[str, Any]
    footprint: Any


def load(job: dict[str, Any]) -> Loaded:
    import torch

    from diffquant.convert.footprint import Picture, parts_footprint
    from diffquant.runtime.loading import build, model_for
    from diffquant.runtime.memory.parts import part_source
    from diffquant.runtime.packing import stored_weights

    case, device = FAMILIES[job["family"]], job["device"]
    dtype = getattr(torch, job["dtype"])
    names = {"denoiser": case.denoiser, "vae": case.vae}
    if job["encoders"]:
        keys = ("text_encoder", "text_encoder_2")
        names |= dict(zip(keys, case.encoders, strict=False))
    sources, modules = {}, {}
    for part, name in names.items():
        logical, found = source(name, job["type"], part=part)
        sources[part] = one = part_source(logical, found, dtype=dtype, device=device)
        weights = stored_weights(logical, found, one.layout, one.reads)
        hyper = case.hyper if part == "denoiser" else {}
        modules[part] = build(model_for(found.kind), weights, hyper, dtype=dtype, device=device)
    side = job["pixels"] or case.pixels
    compute = {"float32": "F32", "bfloat16": "BF16"}[job["dtype"]]
    architecture = "flux1" if job["family"] == "flux1" else job["family"]
    found = parts_footprint(
        sources,
        Picture(side, side, compute=compute),
        architecture=architecture,
        guided=case.guided,
    )
    return Loaded(modules, found)


def calls(job: dict[str, Any], loaded: Loaded, decoder: str) -> Iterator[Callable[[], object]]:
    """One call per stage."""
    import torch

    case, device = FAMILIES[job["family"]], job["device"]
    dtype = getattr(torch, job["dtype"])
    side = (job["pixels"] or case.pixels) // 8

    def some(*shape: int, kind: Any = dtype) -> Any:
        return torch.full(shape, 0.1, dtype=kind, device=device)

    for name, module in loaded.modules.items():
        if not name.startswith("text_encoder"):
            continue
        tokens = 77 if "clip" in type(module).__module__ else TOKENS
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        yield functools.partial(module, ids)
    yield functools.partial(denoise, job["family"], loaded.modules["denoiser"], side, some)
    vae = loaded.modules["vae"]
    latents = loaded.modules["vae"].config.latents
    factor = vae.config.factor
    z = vae.unscale(some(1, latents, side * 8 // factor, side * 8 // factor))
    if decoder == "whole":
        yield functools.partial(vae.decode, z)
    else:
        from diffquant.runtime.strips import Decoding, decode_in

        yield functools.partial(decode_in, vae, z, Decoding(decoder))


def denoise(family: str, model: Any, side: int, some: Callable[..., Any]) -> object:
    import torch

    one = some(1, kind=torch.float32)
    tokens = (side // 2) ** 2
    if family in ("sd15", "sdxl"):
        label = some(2, model.config.label) if model.config.label else None
        width = {"sd15": 768, "sdxl": 2048}[family]
        return model(some(2, 4, side, side), one.expand(2), some(2, 77, width), label)
    if family == "flux1":
        from diffquant.runtime.models.flux import image_ids

        ids = image_ids(side, side), torch.zeros(TOKENS, 3)
        inputs = some(1, tokens, model.config.in_channels), one, some(1, TOKENS, 4096)
        return model(*inputs, some(1, model.config.vector), *ids, one)
    if family == "flux2":
        text = some(1, TOKENS, model.config.context)
        latents = some(1, model.config.in_channels, side // 2, side // 2)
        return model(latents, one, text, one if model.config.guidance else None)
    if family == "z_image":
        return model(some(1, 16, side, side), one, some(1, TOKENS, model.config.caption))
    grid = [(1, side // 2, side // 2)]
    return model(some(1, tokens, 64), one, some(1, TOKENS, 3584), grid)


def rungs(job: dict[str, Any], loaded: Loaded) -> Iterator[Any]:
    """Rungs worth a line: every level, at blocks with none and half of them staying."""
    from diffquant.runtime.memory.plan import Rung

    half = {
        stage.part: len(stage.weights.blocks) // 2
        for stage in loaded.footprint.stages
        if stage.weights.blocks
    }
    stage = next(one for one in loaded.footprint.stages if one.name == "decode")
    decoders = ["whole", *(["strips"] if stage.tiled is not None and job["strips"] else [])]
    if stage.host is not None and job["strips"] and job["device"] != "cpu":
        decoders.append("host")
    for level in job["levels"]:
        for resident in ({}, half) if level == "blocks" else ({},):
            yield from (
                Rung(level, one, job["pinned"] and level in ("blocks", "sequential"), resident)
                for one in (decoders if level in ("model", "sequential") else decoders[:1])
            )


def measure(job: dict[str, Any], loaded: Loaded, rung: Any) -> dict[str, Any]:
    """Place, run every stage, and say what was predicted; on CUDA also what was taken."""
    import torch

    from diffquant.convert.footprint import CONTEXT_NBYTES
    from diffquant.runtime.memory.placement import Placement
    from diffquant.runtime.memory.rungs import host_nbytes, stage_peaks

    cuda = job["device"] == "cuda"
    placement = Placement(loaded.modules, torch.device(job["device"]))
    placement.settle(rung)
    peaks = stage_peaks(loaded.footprint, rung, device=job["device"])
    worst = max(peaks, key=lambda one: one.total)
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, seconds = time.monotonic(), []
    with torch.no_grad():  # as the pipeline; slots are filled by another thread
        for call in calls(job, loaded, rung.decoder):
            for _ in range(2 if rung.level in ("blocks", "sequential") else 1):
                start = time.perf_counter()
                call()
                if cuda:
                    torch.cuda.synchronize()
            seconds.append(round(time.perf_counter() - start, 3))
    found = {
        "rung": [rung.level, rung.decoder, dict(rung.resident), rung.pinned],
        "predicted_nbytes": worst.total,
        "context_nbytes": CONTEXT_NBYTES[job["device"]],
        "host_nbytes": host_nbytes(loaded.footprint, rung, device=job["device"]),
        "decided_by": f"{worst.stage}: {worst.title}",
        "stages": {f"{p.stage} {p.part}": [p.weights, p.activations, p.scratch] for p in peaks},
        "seconds": seconds,
        "placed_s": time.monotonic() - before,
    }
    if cuda:
        found["allocated_nbytes"] = torch.cuda.max_memory_allocated()
        found["reserved_nbytes"] = torch.cuda.max_memory_reserved()
    placement.release()
    return found


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One rung in a process of its own, on a CPU."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.set_flush_denormal(True)  # equal weights make numbers that are slow and mean nothing
    loaded = load(job)
    rung = list(rungs(job, loaded))[job["index"]]
    return measure(job, loaded, rung)


def jobs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for family in arguments.families.split(","):
        for stored in arguments.types.split(","):
            yield {
                "family": family,
                "type": stored,
                "device": arguments.device,
                "dtype": arguments.dtype,
                "levels": arguments.levels.split(","),
                "pixels": arguments.pixels,
                "encoders": arguments.encoders,
                "strips": arguments.strips,
                "pinned": arguments.pinned,
                "threads": arguments.threads,
            }


def rows(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if job["device"] == "cpu":
        for index, _ in enumerate(rungs(job, load(job))):
            yield run({**job, "index": index}, __file__)
        return
    loaded = load(job)
    for rung in rungs(job, loaded):
        yield {**job, **measure(job, loaded, rung)}


def show(row: dict[str, Any]) -> None:
    context = row["context_nbytes"] if row["device"] == "cpu" else 0
    predicted = row["predicted_nbytes"] + context
    measured = row.get("allocated_nbytes") or row["anonymous_nbytes"]
    row["off"] = predicted / measured - 1
    level, decoder, resident, pinned = row["rung"]
    kept = f" {sum(resident.values())} stay" if resident else ""
    name = f"{row['family']} {row['type']}, {level}{kept}, {decoder}{', pinned' if pinned else ''}"
    print(
        f"{name:52} {mib(predicted):>8} {mib(measured):>8} {row['off']:>+7.1%} "
        f"{mib(row.get('reserved_nbytes')):>8}  {'+'.join(map(str, row['seconds']))} s, "
        f"{row['decided_by']}{'' if abs(row['off']) <= LIMIT else '  OUTSIDE'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--types", default="bf16,q8_0,q4_k_s")
    parser.add_argument("--levels", default="none,model,blocks,sequential")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--pixels", type=int, default=0)
    parser.add_argument("--encoders", action="store_true")
    parser.add_argument("--strips", action="store_true", help="also decode in strips")
    parser.add_argument("--pinned", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    report: dict[str, Any] = {"environment": environment(), "rows": []}
    print(f"{'peaks in MiB':52} {'predicted':>8} {'measured':>8} {'off':>7} {'reserved':>8}")
    for job in jobs(arguments):
        for row in rows(job):
            show(row)
            report["rows"].append(row)
    outside = sum(abs(row["off"]) > LIMIT for row in report["rows"])
    print(f"{len(report['rows'])} rungs, {outside} more than {LIMIT:.0%} off", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
