"""How much memory and time does quantizing a 4 GB checkpoint take, and what was planned?

python benchmarks/streaming_memory.py [--json FILE] [--workdir DIR] [--gigabytes 4]
    [--types q4_k_s,...] [--threads 1,2] [--chunks 18,20,22] [--profile] [--no-peers]

Builds a bfloat16 checkpoint with the names and widths of Flux.1-dev and fewer blocks, in DIR (a
temporary folder by default), and deletes it afterwards. Each run is a process of its own whose
anonymous memory is sampled 50 times a second: what the program allocated, without the page cache.
`own` is what the same quantization of a model 256 wide takes: interpreter, libraries and compiled
kernels. What streaming needs above it is set against the plan's number, per weight in flight
(threads x CHUNK); `anon` also has what re-reading the output takes.

Peers, measured in the same way: ggml's library (ctypes, chunks of rows) for q4_k, gguf-py's numpy
for q8_0, tensor by tensor as converters do it. Neither checks what it wrote; `--verify none` is
what compares with them. A first run warms the page cache and the compiled kernels, and is not
reported.

    seconds = stream (read, encode, decode again and compare, hash, write)
            + commit (fsync, rename) + re-read (open the output, hash it again)
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flux_shaped import HEADS, HIDDEN, blocks_for, build, flux_shapes
from peak_memory import SAMPLE_S, environment, mib, run

LOADED = {
    "the interpreter with numpy": ("numpy",),
    "the same and diffquant's planner": ("diffquant.convert.jobs",),
    "the same and numba, llvmlite": ("diffquant.convert.jobs", "numba"),
}


# --- what runs in a process of its own -----------------------------------------------------------


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize as the command does; the phases are told apart by wrapping two functions."""
    from diffquant.convert import cutting, jobs
    from diffquant.convert.plan import Request
    from diffquant.quant.types import type_named

    if job.get("chunk"):
        cutting.CHUNK = 1 << job["chunk"]
    spent: dict[str, float] = {}
    for name in ("run_plan", "verify_output"):
        setattr(jobs, name, timed(getattr(jobs, name), spent, name))
    layers = _wrap_layers(spent) if job.get("profile") else ()
    out = Path(job["out"])
    kind = type_named(job["type"])
    request = Request(container=jobs.container_for(out), type=kind)
    start = time.perf_counter()
    report = jobs.run_job(
        Path(job["source"]),
        out,
        request,
        force=True,
        workers=job["threads"],
        verify=job["verify"],
    )
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds,
        "stream_end": spent.pop("end of run_plan"),
        "stream_s": spent["run_plan"],
        "reread_s": spent.get("verify_output", 0.0),
        "planned_nbytes": report.peak_nbytes,
        "weights": sum(row.parameters for row in report.tensors),
        "output_nbytes": out.stat().st_size,
        "bits_per_weight": report.bits_per_weight,
        "error": report.error,
    }
    result["commit_s"] = seconds - result["stream_s"] - result["reread_s"]
    if layers:
        result["layers_s"] = {name: spent.get(name, 0.0) for name in layers}
    return result


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            if name == "run_plan":
                spent["end of run_plan"] = time.monotonic()

    return wrapped


def _wrap_layers(spent: dict[str, float]) -> tuple[str, ...]:
    """Time what a chunk goes through; meant for one thread, where the parts add up."""
    from diffquant.convert import chunk_work, logical, step_state
    from diffquant.io import atomic, reading
    from diffquant.quant import metrics

    load = chunk_work.backend

    def loaded(codec: str, operation: str, device: str = "cpu") -> Callable[..., Any]:
        return timed(load(codec, operation, device), spent, operation)

    chunk_work.backend = loaded
    digest = chunk_work.hashlib.sha256

    class Hashes:
        sha256 = staticmethod(timed(digest, spent, "sha256"))

    chunk_work.hashlib = Hashes
    step_state.amax_of = timed(step_state.amax_of, spent, "finite?")
    chunk_work.amax_of = step_state.amax_of
    for owner, name, label in (
        (logical.LogicalSource, "read", "read, to float32"),
        (metrics.ErrorStats, "add", "error sums"),
        (atomic.PartialFile, "write", "write"),
        (reading.RandomFile, "read", "  of which disk"),
    ):
        setattr(owner, name, timed(getattr(owner, name), spent, label))
    return (
        "read, to float32",
        "  of which disk",
        "finite?",
        "reduce",
        "encode",
        "decode",
        "error sums",
        "sha256",
        "write",
    )


def peer(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize every matrix with a peer's routine and write the bytes, one tensor at a time."""
    from diffquant.io import open_source

    start = time.perf_counter()
    encode = _ggml(job["threads"]) if job["peer"] == "ggml" else _gguf_py
    with open_source(Path(job["source"])) as source, Path(job["out"]).open("wb") as out:
        for key, spec in source.specs.items():
            if len(spec.shape) < 2 or spec.shape[1] % 256:
                out.write(source.read(key).tobytes())
                continue
            for data in encode(source, key, spec.shape):
                out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return {"seconds": time.perf_counter() - start}


def _float32(raw: np.ndarray, columns: int) -> np.ndarray:
    wide = raw.view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32).reshape(-1, columns)


def _gguf_py(source: Any, key: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    import gguf

    weight = _float32(source.read(key), shape[1])
    yield gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0).tobytes()


def _ggml(threads: int) -> Callable[[Any, str, tuple[int, ...]], Iterator[bytes]]:
    from concurrent.futures import ThreadPoolExecutor

    found = importlib.util.find_spec("pywhispercpp")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent.parent / "pywhispercpp.libs"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    pool = ThreadPoolExecutor(threads)

    def encode(source: Any, key: str, shape: tuple[int, ...]) -> Iterator[bytes]:
        rows = max((1 << 20) // shape[1], 1)

        def one(start: int) -> bytes:
            weight = _float32(source.read(key, (start, min(start + rows, shape[0]))), shape[1])
            packed = np.empty((len(weight), shape[1] // 256 * 144), np.uint8)
            library.ggml_quantize_chunk(
                12, weight.ctypes.data, packed.ctypes.data, 0, *weight.shape, None
            )
            return packed.tobytes()

        starts = range(0, shape[0], rows)
        for first in range(0, len(starts), threads):
            yield from pool.map(one, starts[first : first + threads])

    return encode


def child(text: str) -> None:
    job = json.loads(text)
    result: dict[str, Any] = {}
    if job.get("load"):
        for module in job["load"]:
            importlib.import_module(module)
        time.sleep(3 * SAMPLE_S)
    else:
        result = peer(job) if "peer" in job else quantize(job)
    print(json.dumps(result))


# --- measuring -----------------------------------------------------------------------------------


def run_child(job: dict[str, Any]) -> dict[str, Any]:
    return run(job, __file__)


HEAD = (
    f"{'run':26} {'threads':>7} {'s':>6} {'MB/s':>5} {'stream':>6} {'commit':>6} {'reread':>6} "
    f"{'anon':>5} {'in stream':>9} {'own':>5} {'plan':>5} {'B/weight':>8} {'rss':>5} {'x peer':>6}"
)


def show(label: str, one: dict[str, Any]) -> None:
    line = f"{label:26} {one['threads']:7} {one['seconds']:6.1f} {one['mb_s']:5.0f} "
    for name in ("stream_s", "commit_s", "reread_s"):
        line += f"{one[name]:6.1f} " if name in one else f"{'':6} "
    stream = one["stream_anonymous_nbytes"] if "stream_s" in one else None
    line += f"{mib(one['anonymous_nbytes']):>5} {mib(stream):>9} "
    line += f"{mib(one.get('own_nbytes')):>5} {mib(one.get('planned_nbytes')):>5} "
    per = one.get("bytes_per_weight")
    line += f"{per:8.1f} " if per is not None else f"{'':8} "
    line += f"{mib(one['resident_nbytes']):>5} "
    line += f"{one['ratio']:6.1f}" if "ratio" in one else ""
    print(line.rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--types", default="q4_k_s,q8_0,fp8_scaled,nf4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--chunks", default="", help="log2 of weights per chunk to try, q4_k_s")
    parser.add_argument("--no-peers", action="store_true", help="ours alone: no ratios")
    parser.add_argument("--profile", action="store_true", help="time the parts, one thread")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
        report = measure(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = {"environment": environment(), "runs": []}
    source, small = folder / "flux.safetensors", folder / "small.safetensors"
    double, single = blocks_for(arguments.gigabytes * 1e9)
    build(small, flux_shapes(HIDDEN // HEADS * 2, 1, 1))
    start = time.perf_counter()
    nbytes = build(source, flux_shapes(HIDDEN, double, single))
    report["source"] = {"nbytes": nbytes, "double_blocks": double, "single_blocks": single}
    print(
        f"source: {nbytes / 1e9:.2f} GB bf16, {double} double and {single} single blocks of width "
        f"{HIDDEN}, built in {time.perf_counter() - start:.0f} s; memory in MiB"
    )
    threads = [int(one) for one in arguments.threads.split(",")]
    chunk = 20  # cutting.CHUNK
    report["loaded"] = {}
    for label, modules in LOADED.items():
        one = run_child({"load": modules})["anonymous_nbytes"]
        report["loaded"][label] = one
        print(f"anonymous memory of {label}: {mib(one)}")

    def job(kind: str, count: int, path: Path, **more: Any) -> dict[str, Any]:
        suffix = ".gguf" if kind in ("q4_k_s", "q8_0") else ".safetensors"
        out = folder / f"out{suffix}"
        found = {"type": kind, "threads": count, "source": str(path), "out": str(out)}
        one = run_child({**found, "verify": "tensors", **more})
        out.unlink()
        return one

    def quantized(kind: str, count: int, label: str, **more: Any) -> dict[str, Any]:
        own = job(kind, count, small, **more)["stream_anonymous_nbytes"]
        one = job(kind, count, source, **more)
        one["mb_s"] = nbytes / 1e6 / one["seconds"]
        if own is not None:
            one["own_nbytes"] = own
            in_flight = count << more.get("chunk", chunk)
            one["bytes_per_weight"] = (one["stream_anonymous_nbytes"] - own) / in_flight
        against = peers.get((kind, count))
        if against is not None:
            one["ratio"] = against / one["seconds"]
        report["runs"].append(one)
        show(label, one)
        return one

    job("q4_k_s", max(threads), source)  # warm-up
    print(HEAD)
    peers: dict[tuple[str, int], float] = {}
    for kind, name in (("q4_k_s", "ggml"), ("q8_0", "gguf-py")):
        for count in threads if name == "ggml" else threads[:1]:
            if kind not in arguments.types.split(",") or arguments.no_peers:
                continue
            found = {"threads": count, "source": str(source), "out": str(folder / "peer")}
            one = run_child({"peer": name, **found})
            one["mb_s"] = nbytes / 1e6 / one["seconds"]
            (folder / "peer").unlink()
            peers[kind, count] = one["seconds"]
            report["runs"].append(one)
            show(f"{name} {'q4_k' if name == 'ggml' else kind}, its routine", one)
    for kind in arguments.types.split(","):
        for count in threads:
            for verify in ("tensors", "none"):
                quantized(kind, count, f"{kind}, verify {verify}", verify=verify)
    for exponent in (int(one) for one in arguments.chunks.split(",") if one):
        for count in threads:
            quantized("q4_k_s", count, f"q4_k_s, chunk 2**{exponent}", chunk=exponent)
    if arguments.profile:
        for kind in arguments.types.split(","):
            one = quantized(kind, 1, f"{kind}, timed", profile=True)
            for name, seconds in one["layers_s"].items():
                print(f"    {name:20} {seconds:6.1f} s")
    return report


if __name__ == "__main__":
    main()
