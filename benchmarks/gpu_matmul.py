"""Products in 8 bits on a card, layers of Flux.1, and few rows; to a bf16 GEMM of the same run.

python benchmarks/gpu_matmul.py [--shapes NxK ...] [--tokens 4608] [--few 1 16 64] [--rounds 15]
                                [--parts layers,few,rows,fused] [--json FILE]
                                [--formats NAME ...]
python benchmarks/gpu_matmul.py --sweep [--kinds int8 fp8]     every tile of triton/gemm.py
python benchmarks/gpu_matmul.py --sweep --parts few [--formats NAME ...] [--jobs 14]
                                every tile of triton/few.py, see few_sweep.py; two minutes
TRITON_INTERPRET=1 python benchmarks/gpu_matmul.py --tiny      every branch, no GPU, no timings

    layers   a product of --tokens rows, by every routine; `rows` is what quantizing the
             activations takes, and a layer is their sum
    rows     quantizing activations: to fp8, to int8, to rotated int8; GB/s of what must move
    fused    the same behind GELU, by every way (warps, row held or not); for triton/rows.py
    few      --few rows with a packed weight: one kernel, against decoding and then multiplying; see
             gpu_few.py

    ms       median of --rounds by CUDA events around a replayed CUDA graph of the call; 512 MiB are
             written before each (cold cache)
    x        over the bfloat16 GEMM of the same shape in this run
    TFLOP/s  2 M N K over ms
    error    relative, to the float32 product of the operands before they were quantized: Gaussian
             numbers, 512 rows
    equal    int8 has to be the reference's (512 rows of it) exactly, few rows float32 sums rounded

A routine that fails is a row that says so. On an H100 layers, rows and few take half a minute,
fused one, --sweep of int8 a quarter.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from few_sweep import sweep_few
from gpu_few import FEW_FORMATS, few_rows
from peak_memory import environment, version
from torch import Tensor
from torch.nn import functional

from diffquant.runtime.kernels import products
from diffquant.runtime.kernels import rows as reference
from diffquant.runtime.kernels.triton import gemm
from diffquant.runtime.kernels.triton import rows as fast_rows

SHAPES = (
    (3072, 3072),
    (9216, 3072),
    (12288, 3072),
    (3072, 12288),
    (3072, 15360),
    (21504, 3072),
)
TINY = ((48, 64), (64, 512))
FLUSHED_NBYTES = 512 << 20
JUDGED_ROWS = 512
CANDIDATES = {  # by whether it is tiny
    False: gemm.CANDIDATES,
    True: tuple(gemm.GemmTile(32, 32, 32, 1, 4, descriptors=way) for way in (False, True)),
}
Shape = tuple[int, int]
Operands = tuple[Tensor, Tensor, Tensor, Tensor]


class Bench:
    """The device, its clock, rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, []
        self.device = "cpu" if args.tiny else "cuda"
        # the interpreter has no bfloat16 products
        self.dtype = torch.float16 if args.tiny else torch.bfloat16
        nbytes = 1 if args.tiny else FLUSHED_NBYTES
        self.flushed = torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def ms(self, work: Callable[[], object]) -> float:
        """Median milliseconds of a call."""
        if self.args.tiny:
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        run = self._captured(work)
        events = []
        for round_ in range(self.args.rounds + 3):
            self.flushed.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            if round_ >= 3:
                events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)

    def _captured(self, work: Callable[[], object]) -> Callable[[], object]:
        """A call as a CUDA graph: what a small kernel takes is else what launching it takes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # compiled, work spaces made
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def row(self, what: str, name: str, shape: Shape, work: Callable[[], dict[str, Any]]) -> None:
        """Make and print a row; one that fails says so."""
        row: dict[str, Any] = {"what": what, "name": name, "shape": shape}
        try:
            row |= work()
        except Exception as error:  # the device's time is dear: the other rows go on
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
        self.rows.append(row)
        told = " ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
            if key not in ("what", "name", "shape")
        )
        print(f"{what:7} {name:35} {shape[0]:>6}x{shape[1]:<6} {told}", flush=True)


def by_triton(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None,
    dtype: torch.dtype, *, descriptors: bool,
) -> Tensor:  # fmt: skip
    """The tile that is in use, fed in this way."""
    tile = gemm.tile_for(len(a), (b.shape[0], b.shape[1]))._replace(descriptors=descriptors)
    return gemm.multiply_rows(a, a_scale, b, b_scale, bias, dtype, tile=tile)


ROUTINES: dict[str, dict[str, Callable[..., Tensor]]] = {
    kind: {
        **own,
        "triton, pointers": functools.partial(by_triton, descriptors=False),
        "triton, descriptors": functools.partial(by_triton, descriptors=True),
    }
    for kind, own in (
        ("fp8", {"torch._scaled_mm": products.scaled_mm}),
        ("int8", {"torch._int_mm": products.int_mm}),
    )
}


def judged(kind: str, found: Tensor, operands: Operands, x: Tensor, w: Tensor) -> dict[str, Any]:
    """Error to what was quantized, and whether int8 is exactly the reference's."""
    some = slice(0, JUDGED_ROWS)
    wanted = x[some].float() @ w.float().t()
    gap = torch.linalg.vector_norm(found[some].float() - wanted) / torch.linalg.vector_norm(wanted)
    row: dict[str, Any] = {"error": float(gap)}
    if kind == "int8":
        a, a_scale, b, b_scale = operands
        sums = reference.multiply_rows(a[some], a_scale[some], b, b_scale, None, found.dtype)
        row["equal"] = torch.equal(found[some], sums)
    return row


def layers(bench: Bench) -> None:
    """Every routine on every layer."""
    for shape in bench.args.shapes:
        x, w = bench.normal(bench.args.tokens, shape[1]), bench.normal(*shape) * 0.02
        base = bench.ms(functools.partial(functional.linear, x, w))
        flop = 2.0 * len(x) * shape[0] * shape[1]
        bench.row("layers", "bf16 gemm", shape, lambda ms=base, f=flop: gemm_row(ms, f))
        for kind, every in ROUTINES.items():
            operands = (*fast_rows.quantize_rows(x, kind), *fast_rows.quantize_rows(w, kind))
            took = bench.ms(functools.partial(fast_rows.quantize_rows, x, kind))
            for name, routine in every.items():
                work = functools.partial(
                    layer_row, bench, kind, routine, operands, x, w, base, took
                )
                bench.row("layers", f"{kind} {name}", shape, work)


def gemm_row(ms: float, flop: float) -> dict[str, Any]:
    return {"ms": ms, "tflops": flop / ms / 1e9}


def layer_row(
    bench: Bench, kind: str, routine: Callable[..., Tensor], operands: Operands, x: Tensor,
    w: Tensor, base: float, took: float,
) -> dict[str, Any]:  # fmt: skip
    found = routine(*operands, None, bench.dtype)
    ms = bench.ms(functools.partial(routine, *operands, None, bench.dtype))
    return {
        **gemm_row(ms, 2.0 * len(x) * w.numel()),
        "x": ms / base,
        "rows_ms": took,
        "x_with_rows": (ms + took) / base,
        **judged(kind, found, operands, x, w),
    }


def activation_rows(bench: Bench) -> None:
    """Quantizing activations, to the bytes that must move."""
    for k in sorted({shape[1] for shape in bench.args.shapes}):
        x = bench.normal(bench.args.tokens, k)
        for kind, rotation in (("fp8", 0), ("int8", 0), ("int8", 256), ("int8", 64)):
            if k % (rotation or 1) == 0:
                rotated = f", rotated {rotation}" if rotation else ""
                work = functools.partial(rows_row, bench, x, kind, rotation)
                bench.row("rows", f"{kind}{rotated}", (len(x), k), work)


def rows_row(bench: Bench, x: Tensor, kind: str, rotation: int) -> dict[str, Any]:
    found, scale = fast_rows.quantize_rows(x, kind, rotation=rotation)
    wanted, _ = reference.quantize_rows(x, kind, rotation=rotation)
    ms = bench.ms(functools.partial(fast_rows.quantize_rows, x, kind, rotation=rotation))
    nbytes = x.nbytes + found.nbytes + scale.nbytes
    same = torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))
    return {"ms": ms, "gb_per_s": nbytes / ms / 1e6, "equal": same}


FUSED = (("plain", 3072, 0), ("behind", 15360, 3072), ("alone", 12288, 0), ("gated", 5120, 0))


def fused_rows(bench: Bench) -> None:
    """Rows of what comes before them, by every way."""
    tokens = 48 if bench.args.tiny else bench.args.tokens
    for name, columns, width in FUSED:
        wide = bench.normal(1, tokens, columns * (2 if name == "gated" else 1))
        for kind, rotation in (("fp8", 0), ("int8", 0), ("int8", 256)):
            work = functools.partial(fused_row, bench, name, wide, width, kind, rotation)
            bench.row("fused", f"{name} {kind} {rotation}", (tokens, columns), work)


def fused_row(
    bench: Bench, name: str, wide: Tensor, width: int, kind: str, rotation: int
) -> dict[str, Any]:
    found = []
    for way in fast_rows.WAYS:
        if rotation and not way.held:
            continue
        if name == "plain":
            call = functools.partial(
                fast_rows.quantize_rows, wide[0], kind, rotation=rotation, way=way
            )
        elif name == "gated":
            call = functools.partial(
                fast_rows.gated_rows, *wide.chunk(2, dim=-1), kind, rotation, way
            )
        else:
            parts = wide[..., :width], wide[..., width:]
            call = functools.partial(fast_rows.activated_rows, *parts, kind, rotation, way)
        found.append((bench.ms(call), way))
    found.sort()
    told = ", ".join(f"{way.warps} {'held' if way.held else 'read'} {ms:.4f}" for ms, way in found)
    nbytes = wide.nbytes + call()[0].nbytes
    return {"ms": found[0][0], "gb_per_s": nbytes / found[0][0] / 1e6, "every": told}


def sweep(bench: Bench) -> None:
    """Every tile for every layer, and the table for triton/gemm.py."""
    best: dict[str, dict[Shape, tuple[float, gemm.GemmTile]]] = {}
    for kind in bench.args.kinds:
        for shape in bench.args.shapes:
            x, w = bench.normal(bench.args.tokens, shape[1]), bench.normal(*shape)
            base = bench.ms(functools.partial(functional.linear, x, w))
            given = (*fast_rows.quantize_rows(x, kind), *fast_rows.quantize_rows(w, kind))
            wanted = gemm.multiply_rows(*given, None, bench.dtype)
            for tile in CANDIDATES[bench.args.tiny]:
                work = functools.partial(sweep_row, bench, tile, given, base, wanted)
                bench.row("sweep", f"{kind} {tuple(tile)}", shape, work)
                row, here = bench.rows[-1], best.setdefault(kind, {})
                good = "ms" in row and row.get("equal", True)
                if good and (shape not in here or row["ms"] < here[shape][0]):
                    here[shape] = row["ms"], tile
    for kind, table in best.items():
        print(f"# {kind}\nTILES = {{")
        for shape, (_, tile) in table.items():
            print(f"    {shape}: {tile!r},")
        print("}")


def sweep_row(
    bench: Bench, tile: gemm.GemmTile, given: Operands, base: float, wanted: Tensor
) -> dict[str, Any]:
    found = gemm.multiply_rows(*given, None, bench.dtype, tile=tile)
    ms = bench.ms(functools.partial(gemm.multiply_rows, *given, None, bench.dtype, tile=tile))
    row: dict[str, Any] = {"ms": ms, "x": ms / base, "tile": tile}
    if given[0].dtype == torch.int8:
        row["equal"] = torch.equal(found, wanted)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--tokens", type=int, default=4608)
    parser.add_argument("--few", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", help="all; with --sweep: layers")
    parser.add_argument("--kinds", nargs="+", default=["int8", "fp8"], choices=["int8", "fp8"])
    parser.add_argument("--formats", nargs="+", default=FEW_FORMATS, choices=FEW_FORMATS)
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile few's sweep")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small, on the CPU, interpreted")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.rounds < 5:
        parser.error("--rounds: at least 5")
    work = {"layers": layers, "rows": activation_rows, "fused": fused_rows, "few": few_rows}
    sweeps = {"layers": sweep, "few": sweep_few}
    every = sweeps if args.sweep else work
    args.parts = args.parts or ("layers" if args.sweep else ",".join(work))
    if unknown := set(args.parts.split(",")) - every.keys():
        what = "--sweep --parts" if args.sweep else "--parts"
        parser.error(f"{what}: no {', '.join(sorted(unknown))}; known: {', '.join(every)}")
    if args.shapes:
        args.shapes = [tuple(map(int, one.split("x"))) for one in args.shapes]
    else:
        args.shapes = TINY if args.tiny else SHAPES
    if args.tiny:
        args.tokens = 70
        gemm.TILES.update(dict.fromkeys(args.shapes, CANDIDATES[True][0]))
    torch.manual_seed(0)
    bench = Bench(args)
    found: dict[str, Any] = {"environment": environment(), "rows": bench.rows}
    found["versions"] = {name: version(name) for name in ("torch", "triton")}
    if not args.tiny:
        found["device"] = torch.cuda.get_device_name()
        print(found["device"])
    with torch.no_grad():
        for name in args.parts.split(","):
            every[name](bench)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    failed = [row for row in bench.rows if "failed" in row]
    unequal = [row for row in bench.rows if row.get("equal") is False]
    if failed or unequal:
        raise SystemExit(f"{len(failed)} rows failed, {len(unequal)} are not equal")


if __name__ == "__main__":
    main()
