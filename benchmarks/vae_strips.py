"""Decoding whole, in strips, and through host memory: seconds, peak memory, and is it one picture?

python benchmarks/vae_strips.py [--device cuda|cpu] [--pixels 1024,2048] [--json FILE]
                                [--dtype bfloat16] [--threads N] [--only NAME,...]

Autoencoders of SDXL and Flux.1 at their real widths, random weights, random latents, one picture.
Each way to decode is compared with its own whole decode: `off` is the largest difference and its
root mean square, in deviations of that picture; `rounded` is how far the whole itself is from the
same decode in float32 (left out above 1024 pixels). `diffusers tiled` is its enable_tiling() with
tiles of 512 pixels, where diffusers is installed, against its own whole decode with its own
weights. `strips nchw` (CUDA) shows what the layout of the maps is worth.

On CUDA: all in one process, a warm-up thrown away, median of three; peak is
torch.cuda.max_memory_reserved from an emptied cache, weights included. On a CPU: a process each,
one run; peak is anonymous memory less what the same process holds before it decodes. `said` is the
arithmetic of convert/footprint, weights included on CUDA. About two minutes on one H100.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peak_memory import environment, mib, run

MANIFESTS = Path(__file__).parent.parent / "tests" / "data" / "manifests.json.xz"
VAES = {"sdxl": ("sd.vae-kl-f8.ldm", 4), "flux1": ("flux.vae.original", 16)}
OURS = ("whole", "strips", "host")
THEIRS = ("diffusers", "diffusers tiled")
TILE = 512
RUNS = 3


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with lzma.open(MANIFESTS) as file:
        return {key: tuple(shape) for key, shape in json.load(file)[VAES[name][0]].items()}


def ours(name: str, dtype: Any, device: str) -> Any:
    """The package's autoencoder, weights of deviation 1 / sqrt(row length)."""
    import torch

    from diffquant.runtime.layers import PackedWeight
    from diffquant.runtime.loading import build

    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes_of(name).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            value /= math.sqrt(math.prod(shape[1:]))
        elif "norm" in key and key.endswith("weight"):
            value = 1 + 0.1 * value
        else:
            value *= 0.02
        weights[key] = PackedWeight.of(value.to(dtype))
    return build("vae_kl", weights, {}, dtype=dtype, device=device)


def theirs(name: str, dtype: Any, device: str) -> Any:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    latents = VAES[name][1]
    return (
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=latents,
            use_quant_conv=latents == 4,
            use_post_quant_conv=latents == 4,
        )
        .to(device, dtype)
        .eval()
    )


def decoder(vae: Any, how: str) -> Callable[[Any], Any]:
    """The call that decodes z in one of the ways."""
    import torch

    from diffquant.runtime.models.feature_map import StripPlan
    from diffquant.runtime.strips import Decoding, decode_in

    if how in THEIRS:
        vae.use_tiling = how == "diffusers tiled"
        vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // 8
        return lambda z: vae.decode(z).sample
    if how == "strips nchw":

        def contiguous(plan: Any, shape: tuple[int, ...], dtype: Any) -> Any:
            return torch.empty(shape, dtype=dtype, device=plan.store)

        def patched(z: Any) -> Any:
            kept, StripPlan.empty = StripPlan.empty, contiguous  # type: ignore[method-assign]
            try:
                return decode_in(vae, z, Decoding("strips"))
            finally:
                StripPlan.empty = kept  # type: ignore[method-assign]

        return patched
    return lambda z: decode_in(vae, z, Decoding(how))


def latents(name: str, pixels: int, dtype: Any, device: str) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    side = pixels // 8
    return torch.randn(1, VAES[name][1], side, side, generator=generator).to(device, dtype)


def said(name: str, pixels: int, how: str, itemsize: int, *, weights: int) -> int | None:
    from diffquant.convert.footprint.moments import peak
    from diffquant.convert.footprint.strips import strip_moments
    from diffquant.convert.footprint.vae import decode_moments

    size = {"height": pixels // 8, "width": pixels // 8, "itemsize": itemsize, "copied": True}
    shapes = shapes_of(name)
    if how == "whole":
        return peak(decode_moments("vae_kl", shapes, **size)).nbytes + weights
    if how in OURS:
        found = peak(strip_moments("vae_kl", shapes, host=how == "host", **size))
        return found.nbytes + weights
    return None


def off(found: Any, wanted: Any) -> dict[str, float]:
    """Largest and root mean square difference, in deviations of what was wanted."""
    difference = found.float().cpu() - wanted.float().cpu()
    deviation = wanted.float().std().item()
    return {
        "max": float(difference.abs().max()) / deviation,
        "rms": float(difference.square().mean().sqrt()) / deviation,
    }


def on_cuda(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All jobs in this process; the whole of each autoencoder and size comes first."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # float32 is what bfloat16 is compared with
    rows, vae, built, whole, rounded = [], None, None, None, None
    for job in jobs:
        dtype, how = getattr(torch, job["dtype"]), job["how"]
        make, key = (theirs, ours)[how not in THEIRS], (job["vae"], how in THEIRS)
        if built != key:
            vae, built, whole = None, key, None
            torch.cuda.empty_cache()
            vae = make(job["vae"], dtype, "cuda")
        z = latents(job["vae"], job["pixels"], dtype, "cuda")
        call = decoder(vae, how)
        seconds = []
        with torch.no_grad():
            picture = call(z)  # warm-up
            for _ in range(RUNS):
                picture = None
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                picture = call(z)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_reserved()
        allocated = torch.cuda.max_memory_allocated()
        picture = picture.float().cpu()
        if how in ("whole", "diffusers"):
            whole, rounded = picture, None
            if job["pixels"] <= 1024:
                with torch.no_grad():
                    exact = decoder(make(job["vae"], torch.float32, "cuda"), how)(z.float())
                rounded = off(picture, exact)
                del exact
        held = sum(one.numel() * one.element_size() for one in vae.parameters())
        held += sum(one.packed.nbytes for one in vae.modules() if getattr(one, "packed", None))
        predicted = said(job["vae"], job["pixels"], how, dtype.itemsize, weights=held)
        row = {**job, "seconds": statistics.median(seconds), "peak": peak, "allocated": allocated}
        rows.append({**row, "said": predicted, "rounded": rounded, "off": off(picture, whole)})
        print_row(rows[-1])
    return rows


def child(job: dict[str, Any]) -> dict[str, Any]:
    """One decode on the CPU; the picture is left in a file."""
    import torch

    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    make = theirs if job["how"] in THEIRS else ours
    vae = make(job["vae"], dtype, "cpu")
    z = latents(job["vae"], job["pixels"], dtype, "cpu")
    with torch.no_grad():
        decoder(vae, job["how"])(z[:, :, :8, :8])  # what torch loads late
        time.sleep(0.1)
        if not job["decodes"]:
            return {"seconds": 0.0}
        start = time.perf_counter()
        picture = decoder(vae, job["how"])(z)
        seconds = time.perf_counter() - start
    torch.save(picture, job["picture"])
    return {"seconds": seconds}


def on_cpu(jobs: list[dict[str, Any]], threads: int) -> list[dict[str, Any]]:
    import torch

    rows, whole = [], None
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            given = {**job, "threads": threads, "picture": f"{folder}/picture.pt"}
            before = run({**given, "decodes": False}, __file__)["anonymous_nbytes"]
            found = run({**given, "decodes": True}, __file__)
            picture = torch.load(given["picture"])
            if job["how"] in ("whole", "diffusers"):
                whole = picture
            itemsize = getattr(torch, job["dtype"]).itemsize
            row = {**job, "seconds": found["seconds"], "peak": found["anonymous_nbytes"] - before}
            predicted = said(job["vae"], job["pixels"], job["how"], itemsize, weights=0)
            rows.append({**row, "said": predicted, "off": off(picture, whole)})
            print_row(rows[-1])
    return rows


def print_row(row: dict[str, Any]) -> None:
    rounded = row.get("rounded")
    print(
        f"{row['vae']:6} {row['pixels']:5} {row['how']:16} {row['seconds']:8.3f} s"
        f"  peak {mib(row['peak']):>6}  allocated {mib(row.get('allocated')):>6}"
        f"  said {mib(row['said']):>6} MiB  off max {row['off']['max']:.2e}"
        f" rms {row['off']['rms']:.2e}"
        + (f"  rounded rms {rounded['rms']:.2e}" if rounded else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pixels", default="1024,2048")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="autoencoders, by name")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child))))
        return
    ways = [*OURS, *(["strips nchw"] if arguments.device == "cuda" else [])]
    if importlib.util.find_spec("diffusers"):
        ways += THEIRS
    else:
        print("diffusers is not installed: its tiles are left out", file=sys.stderr)
    names = arguments.only.split(",") if arguments.only else list(VAES)
    jobs = [
        {"vae": name, "pixels": int(pixels), "dtype": arguments.dtype, "how": how}
        for name in names
        for pixels in arguments.pixels.split(",")
        for how in ways
    ]
    rows = on_cuda(jobs) if arguments.device == "cuda" else on_cpu(jobs, arguments.threads)
    if arguments.json:
        report = {"environment": environment(), "device": arguments.device, "rows": rows}
        if arguments.device == "cuda":
            import torch

            report["card"] = torch.cuda.get_device_name()
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
