"""Is the memory estimate right? One call of real-size models, measured and estimated.

python benchmarks/footprint.py [--device cpu|cuda] [--json FILE] [--cases NAME,...] [--threads N]
    [--pixels N]

Every case is a process of its own: a model of real names and shapes (tests/data/manifests.json.xz),
its weights filled with one number in the format under test (values change nothing here), one call
of the denoiser or one decoding. Measured on a CPU: peak anonymous memory, sampled 50 times a
second, less what the same process holds after imports, a small convolution and matmul, and for
`ours` a small weight decoded by numba: what CONTEXT_NBYTES has for a CPU, printed first. On CUDA:
torch.cuda.max_memory_allocated, and max_memory_reserved beside it. Estimated: weights, activations
and the decoding of one packed weight, as convert/footprint/ adds them up for a level.

`ours` runs the runtime of this package, `diffusers` that library with plain weights (`pip install
diffusers`; its cases are left out where it is missing). Flux runs one double and one single block
of full width unless its name says all: activations do not depend on depth.
Target: within 20 % of measured, never under it by more than 10 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import lzma
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peak_memory import environment, mib, run

MANIFESTS = Path(__file__).parent.parent / "tests" / "data" / "manifests.json.xz"
LOW, HIGH = -0.10, 0.20


@dataclass(frozen=True)
class Case:
    """A model, how its weights are stored, what it is computed in, and the picture."""

    name: str
    engine: str
    manifest: str
    stored: str  # "bf16", "f32" ... or a type to quantize the denoiser to
    compute: str
    pixels: int
    part: str = "denoiser"
    shallow: bool = False
    cuda_only: bool = False


CASES = (
    Case("sd15 bf16", "ours", "sd15.unet.ldm", "bf16", "bfloat16", 512),
    Case("sd15 f32 compute", "ours", "sd15.unet.ldm", "bf16", "float32", 512),
    Case("sd15 q8_0", "ours", "sd15.unet.ldm", "q8_0", "bfloat16", 512),
    Case("sd15 q4_k_s", "ours", "sd15.unet.ldm", "q4_k_s", "bfloat16", 512),
    Case("sd15 q8_0 f32 compute", "ours", "sd15.unet.ldm", "q8_0", "float32", 512),
    Case("sd15 q4_k_s f32 compute", "ours", "sd15.unet.ldm", "q4_k_s", "float32", 512),
    Case("sd15 diffusers", "diffusers", "sd15.unet.diffusers", "bf16", "bfloat16", 512),
    Case("vae 512", "ours", "sd.vae-kl-f8.ldm", "bf16", "bfloat16", 512, "vae"),
    Case("vae 512 f32", "ours", "sd.vae-kl-f8.ldm", "f32", "float32", 512, "vae"),
    Case("vae 1024", "ours", "flux.vae.original", "bf16", "bfloat16", 1024, "vae"),
    Case("flux", "ours", "flux-dev.transformer.original", "bf16", "bfloat16", 1024, shallow=True),
    Case(
        "flux q4_k_s",
        "ours",
        "flux-dev.transformer.original",
        "q4_k_s",
        "bfloat16",
        1024,
        shallow=True,
    ),
    Case("sdxl 512", "ours", "sdxl-base.unet.ldm", "bf16", "bfloat16", 512),
    Case("sdxl", "ours", "sdxl-base.unet.ldm", "bf16", "bfloat16", 1024, cuda_only=True),
    Case("sdxl q4_k_s", "ours", "sdxl-base.unet.ldm", "q4_k_s", "bfloat16", 1024, cuda_only=True),
    Case(
        "sdxl diffusers",
        "diffusers",
        "sdxl-base.unet.diffusers",
        "bf16",
        "bfloat16",
        1024,
        cuda_only=True,
    ),
    Case(
        "sd3.5 large diffusers",
        "diffusers",
        "sd3.5-large.transformer.diffusers",
        "bf16",
        "bfloat16",
        1024,
        cuda_only=True,
    ),
    Case(
        "flux all q4_k_s",
        "ours",
        "flux-dev.transformer.original",
        "q4_k_s",
        "bfloat16",
        1024,
        cuda_only=True,
    ),
    Case(
        "flux all",
        "ours",
        "flux-dev.transformer.original",
        "bf16",
        "bfloat16",
        1024,
        cuda_only=True,
    ),
)


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    with lzma.open(MANIFESTS) as file:
        found = {key: tuple(shape) for key, shape in json.load(file)[case.manifest].items()}
    if not case.shallow:
        return found

    def early(key: str) -> bool:
        first, number, *_ = f"{key}..".split(".")
        return not first.endswith("_blocks") or number == "0"

    return {key: shape for key, shape in found.items() if early(key)}


class Header:
    """A source of names and shapes alone."""

    container, metadata, configs, path = "safetensors", {}, {}, Path("header")

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
        from diffquant.core.tensors import TensorSpec

        self.specs = {key: TensorSpec(key, dtype, shape) for key, shape in shapes.items()}


COMPUTE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
CASTS = ("bf16", "f16", "f32")


def estimate(case: Case, device: str) -> tuple[Any, dict[str, tuple[str, tuple[int, ...]]]]:
    """The stage under test, and key -> (format, shape) of its weights."""
    from diffquant.convert.binding import bind
    from diffquant.convert.detect import detect, detect_part
    from diffquant.convert.footprint import Picture, footprint, with_denoiser
    from diffquant.convert.footprint.decode import usually
    from diffquant.convert.footprint.weights import plan_weights
    from diffquant.convert.plan import Request, make_plan
    from diffquant.quant.types import type_named

    source = Header(shapes_of(case), case.stored.upper() if case.stored in CASTS else "BF16")
    logical = bind(source)
    specs = logical.specs()
    match = detect_part(specs) if case.part == "vae" else detect(specs)
    picture = Picture(case.pixels, case.pixels, compute=COMPUTE[case.compute])
    is_ours, serving = case.engine == "ours", usually(device.partition(":")[0])
    found = footprint(logical, match, picture, serving=serving, ours=is_ours)
    weights = {key: (case.stored, spec.shape) for key, spec in specs.items()}
    if case.stored not in CASTS:
        plan = make_plan(logical, match, Request("gguf", type=type_named(case.stored)))
        steps = plan.part_steps("denoiser")
        weights = {
            step.key: (step.decision.format or step.stored.lower(), step.assignment.shape)
            for step in steps
        }
        planned = plan_weights(steps, compute=picture.compute, serving=serving)
        found = with_denoiser(found, planned)
    name = "decode" if case.part == "vae" else "denoise"
    return next(one for one in found.stages if one.name == name), weights


def packed(fmt: str, shape: tuple[int, ...], device: str) -> Any:
    """A weight whose stored bytes are all one number."""
    import torch

    from diffquant.core.dtypes import STORAGE
    from diffquant.quant.formats import FORMATS
    from diffquant.runtime.layers import PackedWeight, Segment

    plain = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    parts = {}
    for part in FORMATS[fmt].parts:
        row, size = STORAGE[part.dtype], list(part.shape(shape))
        if row.is_block:
            size[-1] = size[-1] // row.block_size * row.block_nbytes
        dtype = plain.get(part.dtype, torch.uint8)
        value = 0.01 if dtype.is_floating_point else 1
        parts[part.name] = torch.empty(size, dtype=dtype, device=device).fill_(value)
    return PackedWeight((Segment(fmt, shape, parts),))


def ours(case: Case, weights: dict[str, Any], device: str) -> Callable[[], None]:
    """Build with this package's runtime; the call under test."""
    import torch

    from diffquant.runtime.loading import build

    dtype = getattr(torch, case.compute)
    kind = "vae_kl" if case.part == "vae" else "flux" if "flux" in case.manifest else "unet"
    heads = {"attention_head_dim": (5, 10, 20)} if "sdxl" in case.manifest else {}
    bound = {key: packed(fmt, shape, device) for key, (fmt, shape) in weights.items()}
    model = build(kind, bound, heads, dtype=dtype, device=device)
    side = case.pixels // 8

    def some(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.full(shape, 0.1, dtype=kind, device=device)

    if kind == "vae_kl":
        z = some(1, model.config.latents, side, side)
        return lambda: model.decode(z)
    if kind == "flux":
        from diffquant.runtime.models.flux import image_ids

        tokens, one = (side // 2) ** 2, some(1, kind=torch.float32)
        given = some(1, tokens, model.config.in_channels), some(1, 512, model.config.context)
        ids = image_ids(side, side), torch.zeros(512, 3)
        pooled = some(1, model.config.vector)
        return lambda: model(given[0], one, given[1], pooled, *ids, one)
    context = next(shape[1] for key, (_, shape) in weights.items() if "attn2.to_k.w" in key)
    x, text = some(2, 4, side, side), some(2, 77, context)
    label = some(2, model.config.label) if model.config.label else None
    t = some(2, kind=torch.float32)
    return lambda: model(x, t, text, label)


def theirs(case: Case, weights: dict[str, Any], device: str) -> Callable[[], None]:
    """Build with diffusers, its config read off the shapes; the call under test."""
    import diffusers
    import torch

    dtype, side = getattr(torch, case.compute), case.pixels // 8
    sdxl = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    sd3 = {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "out_channels": 16,
        "qk_norm": "rms_norm",
    }
    kinds = {
        "sd15": ("UNet2DConditionModel", {"cross_attention_dim": 768, "attention_head_dim": 8}),
        "sdxl": ("UNet2DConditionModel", sdxl),
        "sd3.5": ("SD3Transformer2DModel", sd3),
    }
    name, config = next(row for key, row in kinds.items() if case.manifest.startswith(key))
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config).to(dtype)
    model = model.to_empty(device=device).eval()
    for one in model.parameters():
        one.data.fill_(0.01)
    found = {key: tuple(one.shape) for key, one in model.named_parameters()}
    assert found == {key: shape for key, (_, shape) in weights.items() if key in found}

    def some(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.1, dtype=dtype, device=device)

    if name.startswith("SD3"):
        x, text, pooled = some(2, 16, side, side), some(2, 333, 4096), some(2, 2048)
        return lambda: model(x, text, pooled, some(2))
    x, text = some(2, 4, side, side), some(2, 77, config["cross_attention_dim"])
    added = {"text_embeds": some(2, 1280), "time_ids": some(2, 6)}
    return lambda: model(
        x, some(2), text, added_cond_kwargs=added if "sdxl" in case.manifest else None
    )


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Build one case and call it once; an empty name stops after the imports."""
    import torch

    from diffquant.core.heap import give_back_freed_blocks

    torch.set_num_threads(job["threads"])
    torch.set_flush_denormal(True)  # equal weights make numbers that are slow and mean nothing
    give_back_freed_blocks()
    device = job["device"]
    for dtype in (torch.float32, torch.bfloat16):  # what torch loads late counts as imports
        torch.nn.functional.conv2d(
            torch.ones(1, 4, 8, 8, dtype=dtype), torch.ones(4, 4, 3, 3, dtype=dtype)
        )
        torch.ones(64, 64, dtype=dtype) @ torch.ones(64, 64, dtype=dtype)
    case = next((one for one in CASES if one.name == job["name"]), None)
    if job["engine"] == "diffusers":
        import diffusers  # noqa: F401 - counts as imports
    if job["engine"] == "ours" and device == "cpu":
        packed("q8_0", (256, 256), device).dequantize(torch.float32)  # numba and its decoder
    if case is None:
        time.sleep(0.1)
        return {}
    case = dataclasses.replace(case, pixels=job["pixels"] or case.pixels)
    stage, weights = estimate(case, device)
    call = {"ours": ours, "diffusers": theirs}[case.engine](case, weights, device)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    built, start = time.monotonic(), time.perf_counter()
    with torch.inference_mode():
        call()
    if cuda:
        torch.cuda.synchronize()
    return {
        "stream_end": built,
        "call_s": time.perf_counter() - start,
        "weights_nbytes": stage.weights.nbytes,
        "activations_nbytes": stage.activations.nbytes,
        "scratch_nbytes": stage.scratch,
        "allocated_nbytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_nbytes": torch.cuda.max_memory_reserved() if cuda else None,
        "derivation": stage.activations.derivation,
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    job = {"device": arguments.device, "threads": arguments.threads, "pixels": arguments.pixels}
    report: dict[str, Any] = {"environment": environment(), **job, "runs": {}}
    if arguments.device.startswith("cuda"):
        import torch

        report["gpu"] = torch.cuda.get_device_name()
    wanted = arguments.cases.split(",") if arguments.cases else None
    bare: dict[str, int] = {}
    print(
        f"{'case':24} {'weights':>8} {'activ.':>7} {'decode':>7} {'estimate':>9} {'measured':>9} "
        f"{'off':>7} {'less w.':>8} {'call s':>7}"
    )
    for case in CASES:
        skipped = case.cuda_only and not arguments.device.startswith("cuda")
        if (case.name not in wanted) if wanted else skipped:
            continue
        if case.engine == "diffusers" and importlib.util.find_spec("diffusers") is None:
            print(f"{case.name:24} left out: diffusers is not installed", file=sys.stderr)
            continue
        if case.engine not in bare:
            none = {**job, "name": "", "engine": case.engine}
            bare[case.engine] = run(none, __file__)["anonymous_nbytes"]
            print(f"process without a model, {case.engine}: {mib(bare[case.engine])} MiB")
        one = run({**job, "name": case.name, "engine": case.engine}, __file__)
        total = one["weights_nbytes"] + one["activations_nbytes"] + one["scratch_nbytes"]
        measured = one["allocated_nbytes"] or one["anonymous_nbytes"] - bare[case.engine]
        one |= {"estimate_nbytes": total, "measured_nbytes": measured, "off": total / measured - 1}
        # what is left of each when the weights, which are known exactly, are taken away
        one["off_without_weights"] = (total - one["weights_nbytes"]) / max(
            measured - one["weights_nbytes"], 1
        ) - 1
        report["runs"][case.name] = one
        mark = "" if LOW <= one["off"] <= HIGH else "  outside"
        print(
            f"{case.name:24} {mib(one['weights_nbytes']):>8} {mib(one['activations_nbytes']):>7} "
            f"{mib(one['scratch_nbytes']):>7} {mib(total):>9} {mib(measured):>9} "
            f"{one['off']:>+7.1%} {one['off_without_weights']:>+8.0%} {one['call_s']:>7.1f}{mark}",
            flush=True,
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", help="names, with commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=0, help="side of the picture, for all cases")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    report = measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
