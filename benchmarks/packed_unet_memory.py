"""Do packed weights stay packed? Memory of loading a real-size SD1.5 UNet and running one step.

python benchmarks/packed_unet_memory.py [--json FILE] [--workdir DIR] [--latent 32] [--types ...]

Writes a UNet with the names and shapes of Stable Diffusion 1.5 (tests/data/manifests.json.xz) and
random bfloat16 weights, quantizes it, and in a process of its own for each file opens the denoiser
and runs one step (batch 1, float32 compute, CPU). Peak anonymous memory is sampled 50 times a
second. A file that is smaller by D bytes should need D bytes less:

    kept = (peak of bf16 - peak of the packed file) / (size of bf16 - size of the packed file)

The peer is the bfloat16 file itself, read in the same way; 85 % is asked of q8_0. Each row is the
median of three processes, files in turn, after one that is thrown away; `spread` is the highest
peak less the lowest. GGUF keeps convolutions in float16, and they are more than half of this UNet,
so q8_0 saves little here. MALLOC_MMAP_THRESHOLD_=33554432 in the environment shows how it was
before diffquant.runtime set glibc's threshold.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peak_memory import environment, mib, run

MANIFESTS = Path(__file__).parent.parent / "tests" / "data" / "manifests.json.xz"
PREFIX = "model.diffusion_model."
ASKED = 0.85
RUNS = 3


def build(path: Path) -> None:
    """Write the UNet: deviation 1 / sqrt(row length), so that numbers stay finite through it."""
    with lzma.open(MANIFESTS) as file:
        shapes = json.load(file)["sd15.unet.ldm"]
    random = np.random.default_rng(0)
    header: dict[str, Any] = {}
    at = 0
    for key, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[PREFIX + key] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            weight = random.standard_normal(math.prod(shape), np.float32)
            weight /= np.float32(math.sqrt(math.prod(shape[1:]))) if shape[1:] else np.float32(50)
            file.write((weight.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Open the denoiser of a file and run one step; `job["path"]` "" stops after the imports."""
    import torch

    from diffquant.convert.binding import bind
    from diffquant.convert.detect import detect
    from diffquant.io import open_source
    from diffquant.runtime.loading import build as build_model
    from diffquant.runtime.packing import packed_weights

    torch.set_num_threads(job["threads"])
    # A float32 matmul and convolution load what torch loads late, so that it counts as imports.
    torch.nn.functional.conv2d(torch.ones(1, 4, 8, 8), torch.ones(4, 4, 3, 3))
    torch.ones(64, 64) @ torch.ones(64, 64)
    if not job["path"]:
        time.sleep(0.1)
        return {}
    start = time.perf_counter()
    with open_source(Path(job["path"])) as source:
        logical = bind(source)
        match = detect(logical.specs(), source.metadata, source.configs)
        part = match.part("denoiser")
        assert part is not None
        weights = packed_weights(logical, part)
        hyper = {name: one.value for name, one in part.hyper.items()}
        model = build_model("unet", weights, hyper, dtype=torch.float32)
        held = sum(weight.nbytes for weight in weights.values())
    loaded = time.perf_counter()
    marker = time.monotonic()
    generator = torch.Generator().manual_seed(0)
    side = job["latent"]
    with torch.inference_mode():
        out = model(
            torch.randn(1, 4, side, side, generator=generator),
            torch.tensor([500.0]),
            torch.randn(1, 77, 768, generator=generator),
        )
    assert torch.isfinite(out).all()
    return {
        "stream_end": marker,
        "load_s": loaded - start,
        "step_s": time.perf_counter() - loaded,
        "held_nbytes": held,
        "file_nbytes": Path(job["path"]).stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", default="q8_0,q4_0,fp8_scaled,fp8_e4m3,nf4")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
        report = measure(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from diffquant.convert.jobs import run_job
    from diffquant.convert.plan import Request
    from diffquant.quant.types import type_named

    report: dict[str, Any] = {"environment": environment(), "runs": {}}
    job = {"latent": arguments.latent, "threads": arguments.threads}
    base = folder / "unet.safetensors"
    build(base)
    imports = run({**job, "path": ""}, __file__)["anonymous_nbytes"]
    report["imports_nbytes"] = imports
    print(f"anonymous memory in MiB; {mib(imports)} of each row are torch and other imports")
    paths = {"bf16": base}
    for name in arguments.types.split(","):
        kind = type_named(name)
        container = "gguf" if "gguf" in kind.dialects else "safetensors"
        paths[name] = folder / f"unet-{name}.{container}"
        request = Request(container=container, type=kind)
        run_job(base, paths[name], request, verify="none")
    run({**job, "path": str(base)}, __file__)  # warm-up
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
    for _ in range(RUNS):
        for name, path in paths.items():
            one = run({**job, "path": str(path)}, __file__)
            one["loading_nbytes"] = one.pop("stream_anonymous_nbytes")
            runs[name].append(one)
    print(
        f"{'weights':12} {'file':>6} {'held':>6} {'loading':>8} {'peak':>6} {'spread':>6} "
        f"{'load s':>7} {'step s':>7} {'x bf16':>7} {'kept':>6}"
    )
    first: dict[str, Any] = {}
    for name, found in runs.items():
        one = {
            key: statistics.median(run[key] for run in found)
            for key in found[0]
            if key.endswith(("_nbytes", "_s"))
        }
        peaks = [run["anonymous_nbytes"] for run in found]
        one["spread_nbytes"] = max(peaks) - min(peaks)
        first = first or one
        saved = first["file_nbytes"] - one["file_nbytes"]
        less = first["anonymous_nbytes"] - one["anonymous_nbytes"]
        one["kept"] = less / saved if saved else None
        one["time_ratio"] = one["step_s"] / first["step_s"]
        report["runs"][name] = one
        kept = "" if one["kept"] is None else f"{one['kept']:6.0%}"
        print(
            f"{name:12} {mib(one['file_nbytes']):>6} {mib(one['held_nbytes']):>6} "
            f"{mib(one['loading_nbytes']):>8} {mib(one['anonymous_nbytes']):>6} "
            f"{mib(one['spread_nbytes']):>6} {one['load_s']:7.1f} {one['step_s']:7.1f} "
            f"{one['time_ratio']:7.2f} {kept}".rstrip(),
            flush=True,
        )
    if "q8_0" in report["runs"]:
        kept = report["runs"]["q8_0"]["kept"]
        print(f"q8_0 keeps {kept:.0%} of what it saves on disk, {ASKED:.0%} asked")
    return report


if __name__ == "__main__":
    main()
