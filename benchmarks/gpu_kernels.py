"""Decoders on a card: milliseconds per format, to the bytes that must move and to a bf16 GEMM.

python benchmarks/gpu_kernels.py [--json FILE] [--formats NAME ...] [--shapes NxK ...] [--jobs 8]
                                 [--rounds 25] [--tokens 4608] [--sweep] [--compile-check]

Random packed weights of a Flux.1 layer, (12288, 3072) and (3072, 12288), are decoded to bfloat16.
A row is the median of its rounds by CUDA events; before each round 512 MiB are written, so that
nothing of the weight is left in the card's cache. Beside it:

    floor   bytes of all parts and of the result, over the bandwidth of a copy in this run
    gemm    the product of 4608 tokens with this weight in bfloat16, in this run
    equal   whether the result is the torch reference's, bit for bit (NaN is NaN)

Asked: at most 1.4 x the floor. bitsandbytes' nf4 is timed too where it can be imported; the IQ1,
IQ2 and IQ3 formats need gguf, which has their grids. Kernels are compiled beforehand by `--jobs`
processes. `--sweep` tries other tiles and numbers of warps instead, the tables for
runtime/kernels/triton/launch.py. `--compile-check` compiles layers with torch.compile and compares
them with the same layers that are not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor, nn

from diffquant.quant.formats import FORMATS
from diffquant.runtime.kernels import KERNELS as REFERENCE
from diffquant.runtime.kernels.triton import KERNELS
from diffquant.runtime.kernels.triton.launch import TILES, Tile, tile
from diffquant.runtime.layers import PackedWeight, QuantLinear, Segment

ASKED = 1.4
SHAPES = ((12288, 3072), (3072, 12288))
FLUSHED_NBYTES = 512 << 20
GRIDS = ("iq1", "iq2", "iq3")
SWEPT = (
    "q8_0", "q4_0", "q2_k", "q3_k", "q4_k", "q6_k", "iq3_s", "nf4", "fp8_e4m3_scaled", "mxfp8",
    "int8_convrot", "int8_convrot_64", "convrot_w4a4", "asym_w4a8_int8", "asym_w4a8_int8_16",
)  # fmt: skip
SWEPT_TILES = tuple(Tile(n, w) for n in (1024, 2048, 4096, 8192) for w in (2, 4, 8))
CHECKED = ("q8_0", "q4_k", "nf4", "fp8_e4m3_scaled", "int8_convrot", "f16", "fp8_e4m3")
STORED = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
Shape = tuple[int, int]


def random_parts(name: str, shape: Shape) -> dict[str, Tensor]:
    """Random bytes where a part is packed, ordinary numbers where it is a float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    row, parts = FORMATS[name], {}
    for part in row.parts:
        size = part.shape(shape)
        if len(row.parts) == 1 and row.block_size:
            size = (shape[0], row.nbytes((1, shape[1])))
        kind = STORED.get(part.dtype, torch.uint8)
        if kind.itemsize > 1:
            values = torch.rand(size, device="cuda", generator=generator) * 0.02 + 0.01
            parts[part.name] = values.to(kind)
        else:
            data = torch.randint(
                0, 256, size, dtype=torch.uint8, device="cuda", generator=generator
            )
            parts[part.name] = data.view(kind)
    return parts


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Equal to the sign of zero; which NaN it is says nothing."""
    bits = {2: torch.int16, 4: torch.int32}[wanted.dtype.itemsize]
    return bool((found.view(bits).eq(wanted.view(bits)) | (found.isnan() & wanted.isnan())).all())


class Clock:
    """Times work on the card, with its cache flushed before every round."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.flushed = torch.empty(FLUSHED_NBYTES, dtype=torch.uint8, device="cuda")

    def ms(self, work: Callable[[], object]) -> float:
        """Median milliseconds of a call."""
        events = []
        for round_ in range(self.rounds + 3):
            self.flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            if round_ >= 3:
                events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def copy_gb_per_s(self) -> float:
        """Bytes read and written in a second by a copy of half the flushed buffer."""
        half = FLUSHED_NBYTES // 2
        source, target = self.flushed[:half], torch.empty(half, dtype=torch.uint8, device="cuda")
        return 2 * half / self.ms(lambda: target.copy_(source)) / 1e6


def compile_one(name: str, shape: Shape) -> None:
    """Fill Triton's cache on disk for a format, in a process of its own."""
    KERNELS[name](random_parts(name, shape), shape, torch.bfloat16)
    torch.cuda.synchronize()


def compile_all(names: list[str], shapes: list[Shape], jobs: int) -> float:
    """Compile all kernels; returns seconds."""
    start = time.monotonic()
    if jobs > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            for one in [pool.submit(compile_one, n, s) for n in names for s in shapes]:
                one.result()
    return time.monotonic() - start


def measure(name: str, shape: Shape, clock: Clock, bandwidth: float, gemm: float) -> dict[str, Any]:
    """A row of the table."""
    parts = random_parts(name, shape)
    found = KERNELS[name](parts, shape, torch.bfloat16)
    equal = same_bits(found, REFERENCE[name](parts, shape, torch.bfloat16))
    nbytes = sum(part.nbytes for part in parts.values()) + found.nbytes
    del found
    ms = clock.ms(lambda: KERNELS[name](parts, shape, torch.bfloat16))
    floor = nbytes / bandwidth / 1e6
    return {
        "format": name,
        "shape": shape,
        "ms": ms,
        "gb_per_s": nbytes / ms / 1e6,
        "floor_ms": floor,
        "to_floor": ms / floor,
        "to_gemm": ms / gemm,
        "equal": equal,
    }


def bitsandbytes_row(shape: Shape, clock: Clock, bandwidth: float, gemm: float) -> dict[str, Any]:
    """bitsandbytes' own nf4, block 64, to bfloat16."""
    from bitsandbytes import functional

    weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nbytes = packed.nbytes + state.absmax.nbytes + weight.nbytes
    ms, floor = (
        clock.ms(lambda: functional.dequantize_4bit(packed, state)),
        nbytes / bandwidth / 1e6,
    )
    return {
        "format": "bitsandbytes nf4",
        "shape": shape,
        "ms": ms,
        "gb_per_s": nbytes / ms / 1e6,
        "floor_ms": floor,
        "to_floor": ms / floor,
        "to_gemm": ms / gemm,
        "equal": None,
    }


def gemm_ms(shape: Shape, tokens: int, clock: Clock) -> float:
    """The product with `tokens` rows, all in bfloat16."""
    weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16, device="cuda")
    return clock.ms(lambda: nn.functional.linear(x, weight))


def rows(args: argparse.Namespace, clock: Clock, bandwidth: float) -> Iterator[dict[str, Any]]:
    """All rows, printed as they come."""
    print(f"{'format':20} {'shape':>14} {'ms':>8} {'GB/s':>6} {'/floor':>7} {'/gemm':>6}")
    for shape in args.shapes:
        gemm = gemm_ms(shape, args.tokens, clock)
        print(f"{'bf16 gemm':20} {shape!s:>14} {gemm:8.4f}   ({args.tokens} tokens)")
        found = [measure(name, shape, clock, bandwidth, gemm) for name in args.formats]
        if importlib.util.find_spec("bitsandbytes"):
            found.append(bitsandbytes_row(shape, clock, bandwidth, gemm))
        for row in found:
            print(
                f"{row['format']:20} {shape!s:>14} {row['ms']:8.4f} {row['gb_per_s']:6.0f} "
                f"{row['to_floor']:7.2f} {row['to_gemm']:6.3f}"
                f"{'' if row['to_floor'] <= ASKED else '  above the limit'}"
                f"{'  NOT EQUAL' if row['equal'] is False else ''}"
            )
            yield {**row, "gemm_ms": gemm}


def swept(args: argparse.Namespace, clock: Clock, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Every tile for some formats."""
    shape = args.shapes[0]
    print(f"{'format':20} {'weights':>8} {'warps':>6} {'ms':>8} {'/floor':>7}")
    for name in args.formats:
        default = tile(name)
        for one in SWEPT_TILES:
            TILES[name] = one
            row = measure(name, shape, clock, bandwidth, math.inf)
            mark = "  *" if one == default else ""
            where = f"{name:20} {one.weights:8} {one.warps:6}"
            print(f"{where} {row['ms']:8.4f} {row['to_floor']:7.2f}{mark}")
            yield {**row, "tile": one, "to_gemm": None}
        TILES[name] = default


def compile_check() -> list[dict[str, Any]]:
    """Layers compiled as one graph against the same layers run eagerly."""
    found, shape = [], (512, 1024)
    for name in CHECKED:
        layer = QuantLinear(shape[1], shape[0], bias=False)
        layer.bind(PackedWeight((Segment(name, shape, random_parts(name, shape)),)))
        x = torch.randn(32, shape[1], dtype=torch.bfloat16, device="cuda")
        wanted = layer(x)
        torch._dynamo.reset()
        result = torch.compile(layer, fullgraph=True)(x)
        equal = same_bits(result, wanted)
        print(f"compiled {name:20} {'equal' if equal else 'DIFFERENT'}")
        found.append({"format": name, "equal": equal})
    return found


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": commit.stdout.strip(),
    }


def known(sweep: bool) -> list[str]:
    """Formats to time: those whose grids are at hand."""
    grids = importlib.util.find_spec("gguf") is not None
    names = [name for name in (SWEPT if sweep else KERNELS) if grids or not name.startswith(GRIDS)]
    if not grids:
        print("gguf is not installed: formats with grids are left out", file=sys.stderr)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--formats", nargs="+", choices=sorted(KERNELS))
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES])
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=4608)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--compile-check", action="store_true")
    args = parser.parse_args()
    args.shapes = [tuple(map(int, one.split("x"))) for one in args.shapes]
    args.formats = args.formats or known(args.sweep)
    result: dict[str, Any] = {"environment": environment()}
    if args.compile_check:
        result["compiled"] = compile_check()
    else:
        jobs = 1 if args.sweep else args.jobs
        result["compile_s"] = compile_all(args.formats, args.shapes, jobs)
        clock = Clock(args.rounds)
        bandwidth = clock.copy_gb_per_s()
        print(f"{result['environment']['device']}, copy {bandwidth:.0f} GB/s")
        work = swept if args.sweep else rows
        result |= {"copy_gb_per_s": bandwidth, "rows": list(work(args, clock, bandwidth))}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    checked = result.get("rows", result.get("compiled", []))
    if any(row["equal"] is False for row in checked):
        sys.exit("some results are not the reference's")


if __name__ == "__main__":
    main()
