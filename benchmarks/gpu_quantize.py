"""Quantizing a Flux.1-sized model on a card and on the CPU: seconds, stages, hashes per tensor.

python benchmarks/gpu_quantize.py [--json FILE] [--types q4_k_s,q8_0] [--runs 3] [--threads N]
    [--folder /dev/shm] [--hidden 3072 --double 19 --single 38] [--device cuda]
    [--kernels] [--lanes]

The source is a bfloat16 file with Flux.1-dev's names and shapes (24 GB at full size), made from
seeded noise, at another place of it for every tensor. It lies in --folder, which should be memory:
then the file is read as a warm one. For every type the CPU quantizes it first, in the same process
on all cores, then the card, each to a file of its own as `diffquant quantize` does it: reading,
encoding, decoding every chunk again and measuring its error, hashing, writing, opening the file
again and comparing hashes. A run of a small model before that compiles the kernels of both; its
seconds are told. Then:

    hash    sha256 of every tensor's bytes, taken from both files: all must agree
    wall    seconds of a whole run, median of --runs
    stages  one more run on the card, thread-seconds of each stage; threads overlap, so they add up
            to more than the wall

`--kernels` times the encoders alone (CUDA events, median of 9, 16 Mi weights that are on the card),
`--lanes` with other lanes too: the table for quant/codecs/triton/launch.py. `--types ""`: no files.

Whole files need numba, as the CPU's side does. Without a card, `--device interpreter --threads 1`
with a tiny --hidden (256) tries the script. The file is GGUF where the type can go there, else
safetensors.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from flux_shaped import Shapes, flux_shapes, size
from peak_memory import version

ASKED_S = 20.0
FULL_SIZE = 11_900_000_000  # Flux.1-dev's weights
TILE = (1 << 24) + 4099
KERNEL_WEIGHTS = 1 << 24
SWEPT = ((64, 2), (128, 4), (256, 8), (128, 2), (256, 4), (64, 1))


def build(path: Path, shapes: Shapes) -> int:
    """Write the source; returns its bytes."""
    normal = np.random.default_rng(7).standard_normal(TILE, np.float32) * np.float32(0.02)
    noise = memoryview((normal.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8))
    header: dict[str, Any] = {}
    at = 0
    for key, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            left, start = 2 * int(np.prod(shape)), 2 * (zlib.crc32(key.encode()) % TILE)
            while left:
                piece = noise[start : start + left]
                file.write(piece)
                left, start = left - len(piece), 0
    return path.stat().st_size


class Stages:
    """Thread-seconds by stage, and how often."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._lock = threading.Lock()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent = time.perf_counter() - start
                with self._lock:
                    self.seconds[name] = self.seconds.get(name, 0.0) + spent
                    self.calls[name] = self.calls.get(name, 0) + 1

        return call

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Time what the engine calls, meanwhile."""
        from diffquant.convert import chunk_work, jobs, step_state
        from diffquant.io import atomic
        from diffquant.quant import staging
        from diffquant.quant.metrics import ErrorStats

        load = chunk_work.backend

        def backend(codec: str, operation: str, device: str = "cpu") -> Callable[..., Any]:
            return self.timed(f"{operation} (CPU)", load(codec, operation, device))

        changes: list[tuple[Any, str, Any]] = [
            (step_state, "float_rows", self.timed("read, as float32", step_state.float_rows)),
            (step_state, "amax_of", self.timed("largest magnitude", step_state.amax_of)),
            (chunk_work, "backend", backend),
            (ErrorStats, "add", self.timed("compare", ErrorStats.add)),
            (
                chunk_work,
                "hashlib",
                SimpleNamespace(sha256=self.timed("hash", hashlib.sha256)),
            ),
            (jobs, "verify_output", self.timed("open again, hash (wall)", jobs.verify_output)),
            (atomic.FlatSink, "write", self.timed("write", atomic.FlatSink.write)),
            (staging.Stages, "encode", self.timed("encode (card, whole)", staging.Stages.encode)),
            (np, "copyto", self.timed("  to page-locked memory", np.copyto)),
        ]
        before = [getattr(owner, name) for owner, name, _ in changes]
        for owner, name, value in changes:
            setattr(owner, name, value)
        try:
            yield
        finally:
            for (owner, name, _), value in zip(changes, before, strict=True):
                setattr(owner, name, value)


def quantize(source: Path, out: Path, kind: str, device: str, threads: int | None) -> Any:
    from diffquant.convert.jobs import run_job
    from diffquant.convert.plan import Request
    from diffquant.quant.types import type_named

    request = Request(out.suffix[1:], type=type_named(kind))
    return run_job(source, out, request, force=True, device=device, workers=threads)


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def hashes(path: Path) -> dict[str, str]:
    """sha256 of every tensor's bytes in a file, by as many threads as there are cores."""
    from concurrent.futures import ThreadPoolExecutor

    from diffquant.io import open_source

    with open_source(path) as source, ThreadPoolExecutor(os.cpu_count()) as pool:
        keys = list(source.specs)
        found = pool.map(lambda key: hashlib.sha256(source.read(key).data).hexdigest(), keys)
        return dict(zip(keys, found, strict=True))


def container_of(kind: str) -> str:
    """The file that a type goes to: GGUF where it can."""
    from diffquant.quant.types import type_named

    return "gguf" if "gguf" in type_named(kind).dialects else "safetensors"


def one_type(kind: str, args: argparse.Namespace, source: Path, small: Path) -> dict[str, Any]:
    folder: Path = source.parent
    found: dict[str, Any] = {"type": kind}
    suffix = container_of(kind)
    outs = {
        device: folder / f"{device.partition(':')[0]}.{suffix}" for device in ("cpu", args.device)
    }
    for device, out in outs.items():
        found[f"first_{device}_s"] = seconds_of(
            lambda out=out, device=device: quantize(small, out, kind, device, args.threads)
        )
        walls = [
            seconds_of(
                lambda out=out, device=device: quantize(source, out, kind, device, args.threads)
            )
            for _ in range(args.runs if device != "cpu" else 1)
        ]
        found[f"{device}_runs_s"], found[f"{device}_s"] = walls, statistics.median(walls)
        print(f"  {kind} {device}: {found[f'{device}_s']:.2f} s", file=sys.stderr, flush=True)
    ours, theirs = hashes(outs[args.device]), hashes(outs["cpu"])
    found["tensors"], found["equal"] = (
        len(theirs),
        sum(ours.get(key) == value for key, value in theirs.items()),
    )
    found["nbytes"] = outs["cpu"].stat().st_size
    outs["cpu"].unlink()
    stages = Stages()
    with stages.watching():
        report = quantize(source, outs[args.device], kind, args.device, args.threads)
    found["stages_s"], found["calls"] = stages.seconds, stages.calls
    found["note"], found["error"] = report.notes[-1] if report.notes else "", report.error
    outs[args.device].unlink()
    return found


def show(one: dict[str, Any], device: str) -> None:
    ratio = one["cpu_s"] / one[f"{device}_s"]
    print(f"\n{one['type']}: {one['note']}")
    print(f"  equal tensors {one['equal']} of {one['tensors']}, error {one['error']}")
    for name in ("cpu", device):
        print(f"  {name:12} {one[f'{name}_s']:8.2f} s   first use {one[f'first_{name}_s']:.1f} s")
    print(f"  {ratio:.2f} times the CPU's speed")
    if one["full_size"]:
        met = "met" if one[f"{device}_s"] < ASKED_S else "missed"
        print(f"  asked: under {ASKED_S:.0f} s: {met}")
    for name, spent in one["stages_s"].items():
        print(f"    {name:28} {spent:8.2f} thread-s {one['calls'][name]:8} calls")


def kernels(device: str, *, swept: bool) -> list[dict[str, Any]]:
    """Encoders alone, and the bus: milliseconds, weights per second."""
    import torch

    from diffquant.quant.backends import BACKENDS, backend
    from diffquant.quant.codecs.triton import launch
    from diffquant.quant.formats import FORMATS

    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(KERNEL_WEIGHTS // 4096, 4096, generator=generator, device=device) * 0.02
    host = torch.empty(weight.shape, pin_memory=True)
    rows = []

    def median_ms(work: Callable[[], object]) -> float:
        found = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        return statistics.median(found[1:])

    for name, work in (
        ("to the card", lambda: weight.copy_(host, non_blocking=True)),
        ("from the card", lambda: host.copy_(weight, non_blocking=True)),
    ):
        ms = median_ms(work)
        rows.append({"what": name, "ms": ms, "gb_s": weight.nbytes / ms / 1e6})
    weight.copy_(torch.randn(weight.shape, generator=generator, device=device) * 0.02)
    for codec, operation, where in BACKENDS:
        if where != "cuda":
            continue
        fmt = next(row for row in FORMATS.values() if row.codec == codec)
        stats = {"max": 0.1, "mean": (0.05, 1)}[fmt.statistic] if fmt.passes == 2 else None
        encode = functools.partial(backend(codec, operation, "cuda"), weight, stats, fmt=fmt.name)
        if fmt.importance == "required":
            encode = functools.partial(encode, importance=torch.ones(4096, device=device))
        used = launch.LANES.get(codec)
        for lanes in (None, *(SWEPT if swept else ())):
            if lanes is not None:
                launch.LANES[codec] = launch.Lanes(*lanes)
            ms = median_ms(encode)
            rows.append(
                {"what": codec, "lanes": lanes, "ms": ms, "gw_s": weight.numel() / ms / 1e6}
            )
            told = "in use" if lanes is None else lanes
            print(f"  {codec:14} lanes {told!s:9} {ms:8.3f} ms", file=sys.stderr, flush=True)
        launch.LANES.pop(codec, None)
        if used is not None:
            launch.LANES[codec] = used
    return rows


def machine() -> dict[str, Any]:
    import torch

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {name: version(name) for name in ("numpy", "numba", "torch", "triton")}
    return {"cores": os.cpu_count(), "cards": cards, **versions}


def use_interpreter() -> None:
    """Let Triton's interpreter on the CPU stand for the card."""
    os.environ["TRITON_INTERPRET"] = "1"
    np.seterr(all="ignore")
    from diffquant.convert import jobs
    from diffquant.quant.backends import BACKENDS
    from diffquant.quant.cards import Cards, cards_for
    from diffquant.quant.codecs.triton import launch

    jobs.cards_for = lambda asked: (
        Cards(("cpu",), asked) if asked == "interpreter" else cards_for(asked)
    )
    launch.LANES.update(
        {codec: launch.Lanes(1 << 15, 4) for codec, _, d in BACKENDS if d == "cuda"}
    )


def whole_files(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Make the source; quantize it to every type."""
    shapes, rows = flux_shapes(args.hidden, args.double, args.single), []
    source, small = folder / "source.safetensors", folder / "small.safetensors"
    spent = seconds_of(lambda: build(source, shapes))
    build(small, flux_shapes(min(args.hidden, 512), 1, 1))
    print(f"source: {size(shapes):,} weights, made in {spent:.1f} s", flush=True)
    for kind in args.types.split(","):
        found = one_type(kind, args, source, small)
        found["full_size"] = size(shapes) >= FULL_SIZE
        rows.append(found)
        show(found, args.device)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--types", default="q4_k_s")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--lanes", action="store_true")
    args = parser.parse_args()
    if args.device == "interpreter":
        use_interpreter()
    result: dict[str, Any] = {"machine": machine(), "types": []}
    print(json.dumps(result["machine"]), flush=True)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if args.kernels:
            result["kernels"] = kernels(args.device, swept=args.lanes)
        if args.types:
            result["types"] = whole_files(args, folder)
    finally:
        shutil.rmtree(folder)
    for row in result.get("kernels", ()):
        print(json.dumps(row))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
