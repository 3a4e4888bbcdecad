"""How fast is quantizing from float32, against the peer that defines each format?

python benchmarks/quantize_cpu.py [--json FILE] [--rows N] [--columns K] [--formats q4_k,nf4]
    [--modes plain,importance] [--compile] [--convert-to-quant PYTHON]

Formats that weigh errors by importance are measured in both modes. Peers, in the same process:
ggml's own library for its block types (ctypes on the one that pywhispercpp 1.5.1 carries),
bitsandbytes for its formats, comfy_kitchen's eager backend for ComfyUI's, torch expressions for
the rest. Both work on one array; ours and ggml take row
chunks of at most 2**20 weights from a thread pool, torch and bitsandbytes their own threads. A
warm-up is thrown away (compilation), then ours and the peer take turns, and the median of five of
each counts. The error is relative; with importance both sides are multiplied by its root.

convert_to_quant (1.3.4 was measured) brings packages of its own, so it runs in an environment of
its own, named by its interpreter; its plain mode, `--simple`, gets an array of the same numbers,
and a line below ours. Without --convert-to-quant that line is left out.

`--compile` measures what the first use of each costs instead, in a process of its own with an empty
cache and then again from the cache.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from comfy_kitchen.backends.eager import convrot_w4a4 as w4a4
from comfy_kitchen.backends.eager import quantization as kitchen
from comfy_kitchen.backends.eager import w4a8_int8 as w4a8

from diffquant.core.dtypes import STORAGE
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS, QuantFormat
from diffquant.quant.metrics import ErrorStats

CHUNK = 1 << 20
RUNS = 5
THREADS = (1, 2)
PACKAGES = ("numpy", "numba", "torch", "bitsandbytes", "comfy-kitchen", "pywhispercpp")


def chunks(weight: np.ndarray) -> list[np.ndarray]:
    rows = max(CHUNK // weight.shape[1], 1)
    return [weight[start : start + rows] for start in range(0, len(weight), rows)]


def median_seconds(*works: Callable[[], object]) -> list[float]:
    """Median of RUNS of each; they take turns, so that a busy moment hits all of them."""
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(RUNS):
        for work, found in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def ours(
    row: QuantFormat,
    weight: np.ndarray,
    importance: np.ndarray | None,
    pool: ThreadPoolExecutor,
) -> None:
    encode = weighing(backend(row.codec, "encode"), importance)
    stats = None
    if row.passes == 2:
        reduce = backend(row.codec, "reduce")
        found = list(pool.map(lambda chunk: reduce(chunk, None, fmt=row.name), chunks(weight)))
        mean = row.statistic == "mean"
        stats = tuple(map(sum, zip(*found, strict=True))) if mean else max(found)
    list(pool.map(lambda chunk: encode(chunk, stats, fmt=row.name), chunks(weight)))


def weighing(
    encode: Callable[..., dict[str, np.ndarray]], importance: np.ndarray | None
) -> Callable[..., dict[str, np.ndarray]]:
    if importance is None:
        return encode
    return functools.partial(encode, importance=importance)


def ggml_library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("pywhispercpp")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent.parent / "pywhispercpp.libs"
    names = sorted(folder.glob("libggml-base*"))
    if not names:
        return None
    library = ctypes.CDLL(str(names[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def ggml(
    library: ctypes.CDLL,
    name: str,
    weight: np.ndarray,
    importance: np.ndarray | None,
    pool: ThreadPoolExecutor,
) -> None:
    storage = STORAGE[name.upper()]
    library.ggml_quantize_init(storage.ggml_id)
    columns = None if importance is None else importance.ctypes.data
    row_nbytes = weight.shape[1] // storage.block_size * storage.block_nbytes

    def encode(chunk: np.ndarray) -> None:
        out = np.empty((len(chunk), row_nbytes), np.uint8)
        library.ggml_quantize_chunk(
            storage.ggml_id, chunk.ctypes.data, out.ctypes.data, 0, *chunk.shape, columns
        )

    list(pool.map(encode, chunks(weight)))


def fp8_scaled(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax() / 448
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def int8_rowwise(weight: torch.Tensor) -> torch.Tensor:
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)
    return (weight / scale).round_().clamp_(-128, 127).to(torch.int8)


def fp8_e5m2_scaled(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax() / 57344
    return (weight / scale).clamp(-57344, 57344).to(torch.float8_e5m2)


def int8_tensor(weight: torch.Tensor) -> torch.Tensor:
    scale = (weight.abs().amax() / 127).clamp(min=1e-30)
    return (weight / scale).round_().clamp_(-128, 127).to(torch.int8)


def four_bits(name: str, weight: torch.Tensor) -> object:
    return bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=name.endswith("_dq"), quant_type=name[:3]
    )


TORCH: dict[str, Callable[[torch.Tensor], object]] = {
    "f16": lambda weight: weight.half(),
    "bf16": lambda weight: weight.bfloat16(),
    "fp8_e4m3": lambda weight: weight.to(torch.float8_e4m3fn),
    "fp8_e4m3_scaled": fp8_scaled,
    "int8_rowwise": int8_rowwise,
    "fp8_e5m2_scaled": fp8_e5m2_scaled,
    "int8_tensor": int8_tensor,
}
PEERS: dict[str, tuple[str, Callable[[torch.Tensor], object]]] = {
    **{name: ("torch", work) for name, work in TORCH.items()},
    **{
        name: ("bitsandbytes", functools.partial(four_bits, name))
        for name in ("nf4", "nf4_dq", "fp4", "fp4_dq")
    },
    "int8_bnb": ("bitsandbytes", bnb.int8_vectorwise_quant),
    "int8_convrot": ("comfy_kitchen", lambda w: kitchen.quantize_int8_convrot_weight(w, 256)),
    "convrot_w4a4": ("comfy_kitchen", lambda w: w4a4.quantize_convrot_w4a4_weight(w, 256)),
    "asym_w4a8_int8": ("comfy_kitchen", w4a8.quantize_w4a8_int8_weight),
    "mxfp8": ("comfy_kitchen", kitchen.quantize_mxfp8),
    "nvfp4_comfy": (
        "comfy_kitchen",
        lambda w: kitchen.quantize_nvfp4(w, w.abs().amax() / (448 * 6)),
    ),
}


def peer_of(
    name: str,
    weight: np.ndarray,
    importance: np.ndarray | None,
    pool: ThreadPoolExecutor,
    library: ctypes.CDLL | None,
) -> tuple[str, Callable[[], object]] | None:
    if name in PEERS:
        tensor = torch.from_numpy(weight)
        return PEERS[name][0], lambda: PEERS[name][1](tensor)
    if library is not None and name.upper() in STORAGE and STORAGE[name.upper()].is_block:
        return "ggml", lambda: ggml(library, name, weight, importance, pool)
    return None


def error_of(row: QuantFormat, weight: np.ndarray, importance: np.ndarray | None) -> float:
    """Relative RMSE; with importance, of errors and weights multiplied by its root."""
    stats = None
    if row.passes == 2:
        stats = backend(row.codec, "reduce")(weight, None, fmt=row.name)
    encode = weighing(backend(row.codec, "encode"), importance)
    parts = encode(weight, stats, fmt=row.name)
    decoded = backend(row.codec, "decode")(parts, weight.shape, fmt=row.name)
    root = np.float32(1) if importance is None else np.sqrt(importance)
    result = ErrorStats()
    result.add(weight * root, decoded * root)
    return result.relative_rmse


def measure(
    row: QuantFormat,
    weight: np.ndarray,
    importance: np.ndarray | None,
    library: ctypes.CDLL | None,
) -> dict[str, object]:
    millions = weight.size / 1e6
    result: dict[str, object] = {
        "bits": row.nbytes(weight.shape) * 8 / weight.size,
        "error": error_of(row, weight, importance),
    }
    for threads in THREADS:
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(threads) as pool:
            works = [lambda pool=pool: ours(row, weight, importance, pool)]
            peer = peer_of(row.name, weight, importance, pool, library)
            if peer is not None:
                works.append(peer[1])
            speeds = [millions / seconds for seconds in median_seconds(*works)]
            result[f"mweights_s_{threads}"] = speeds[0]
            if peer is not None:
                result["peer"] = peer[0]
                result[f"peer_mweights_s_{threads}"] = speeds[1]
                result[f"ratio_{threads}"] = speeds[0] / speeds[1]
    return result


# Our format -> target_format and scaling_mode of its converter, or the module that has one.
CTQ = {
    "fp8_e4m3_scaled": ("fp8", "tensor"),
    "fp8_e4m3_rowwise": ("fp8", "row"),
    "int8_tensor": ("int8", "tensor"),
    "int8_rowwise": ("int8", "row"),
}
_CTQ_RUN = """
import contextlib, io, json, statistics, sys, time
import numpy as np, torch
with contextlib.redirect_stdout(io.StringIO()):
    from convert_to_quant.converters.learned_rounding import LearnedRoundingConverter as Converter
    kind, mode, rows, columns, runs = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    weight = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    weight = torch.from_numpy(weight * np.float32(0.02))
    options = {"optimizer": "original", "no_learned_rounding": True, "device": "cpu"}
    converter = Converter(target_format=kind, scaling_mode=mode, **options)
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seconds = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            out = converter.convert(weight)
            seconds.append(time.perf_counter() - start)
        found[f"seconds_{threads}"] = statistics.median(seconds[1:])
    packed, scale = out[0].float(), out[1].float()
    scale = scale.reshape(-1, 1) if scale.numel() == rows else scale
    errors = [((packed * one - weight).norm() / weight.norm()).item() for one in (scale, 1 / scale)]
    found["error"] = min(errors)  # some modes return the scale, some its inverse
print(json.dumps(found))
"""


def convert_to_quant(python: str, name: str, shape: tuple[int, int]) -> dict[str, float] | None:
    """Seconds per array with 1 and 2 threads, and the error; None where it has no such mode."""
    if name not in CTQ:
        return None
    run = subprocess.run(
        [python, "-c", _CTQ_RUN, *CTQ[name], *map(str, (*shape, RUNS))],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise SystemExit(f"convert_to_quant {name}: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(run.stdout)


def ctq_line(name: str, mine: dict[str, object], theirs: dict[str, float], weights: int) -> str:
    speeds = [weights / 1e6 / theirs[f"seconds_{threads}"] for threads in THREADS]
    ratios = [mine[f"mweights_s_{t}"] / one for t, one in zip(THREADS, speeds, strict=True)]
    return (
        f"{name:16} {'':10} {'':6} {theirs['error']:8.3g} {'':17}  {'conv_to_quant':12} "
        f"{speeds[0]:6.1f} {speeds[1]:6.1f} {ratios[0]:5.1f} {ratios[1]:5.1f}"
    )


_FIRST_USE = """
import sys, time
import numpy as np
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS
row = FORMATS[sys.argv[1]]
weight = np.random.default_rng(0).standard_normal((8, 512), np.float32)
extra = {"importance": np.ones(512, np.float32)} if sys.argv[2] == "importance" else {}
encode, decode = backend(row.codec, "encode"), backend(row.codec, "decode")
start = time.perf_counter()
stats = backend(row.codec, "reduce")(weight, None, fmt=row.name) if row.passes == 2 else None
parts = encode(weight, stats, fmt=row.name, **extra)
middle = time.perf_counter()
decode(parts, weight.shape, fmt=row.name)
print(middle - start, time.perf_counter() - middle)
"""


def first_use(name: str, mode: str) -> dict[str, object]:
    """Seconds of the first encode and decode in a new process: compiled anew, then from cache."""
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as cache:
        for label in ("compiled", "cached"):
            run = subprocess.run(
                [sys.executable, "-c", _FIRST_USE, name, mode],
                env={**os.environ, "NUMBA_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            )
            encode, decode = (float(word) for word in run.stdout.split())
            result[f"encode_s_{label}"], result[f"decode_s_{label}"] = encode, decode
    return result


def environment() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip() or None,
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def modes_of(row: QuantFormat) -> tuple[str, ...]:
    if not row.encodes:
        return ()
    plain = () if row.importance == "required" else ("plain",)
    return plain if row.importance == "unused" else (*plain, "importance")


def speed_line(name: str, mode: str, one: dict[str, object]) -> str:
    line = f"{name:16} {mode:10} {one['bits']:6.3f} {one['error']:8.3g} "
    line += f"{one['mweights_s_1']:9.1f} {one['mweights_s_2']:7.1f}  "
    if "peer" in one:
        line += f"{one['peer']:12} {one['peer_mweights_s_1']:6.1f} {one['peer_mweights_s_2']:6.1f} "
        line += f"{one['ratio_1']:5.1f} {one['ratio_2']:5.1f}"
    return line


def compile_line(name: str, mode: str, one: dict[str, object]) -> str:
    return f"{name:16} {mode:10} " + " ".join(
        f"{one[f'{what}_s_{label}']:7.2f}"
        for label in ("compiled", "cached")
        for what in ("encode", "decode")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--formats", help="comma separated; all that compute anything by default")
    parser.add_argument("--modes", default="plain,importance")
    parser.add_argument("--convert-to-quant", metavar="PYTHON")
    parser.add_argument("--compile", action="store_true", help="measure first uses, not speed")
    arguments = parser.parse_args()
    names = (
        arguments.formats.split(",") if arguments.formats else [n for n in FORMATS if n != "f32"]
    )
    shape = (arguments.rows, arguments.columns)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    squares = rng.standard_normal(arguments.columns, np.float32) ** 2
    library = ggml_library()
    results: dict[str, dict[str, object]] = {}
    if arguments.compile:
        print("Seconds of the first use: compiled (encode, decode), from cache (encode, decode)")
    else:
        print("Mweights/s from float32, median of five; x = ours / peer; 1 and 2 threads")
        print(
            f"{'format':16} {'mode':10} {'bits':>6} {'error':>8} {'ours 1':>9} {'2':>7}  "
            f"{'peer':12} {'1':>6} {'2':>6} {'x1':>5} {'x2':>5}"
        )
    for name in names:
        for mode in modes_of(FORMATS[name]):
            if mode not in arguments.modes.split(","):
                continue
            if arguments.compile:
                one = first_use(name, mode)
                line = compile_line(name, mode, one)
            else:
                importance = squares if mode == "importance" else None
                one = measure(FORMATS[name], weight, importance, library)
                line = speed_line(name, mode, one)
            results[f"{name} {mode}"] = one
            print(line, flush=True)
            python = arguments.convert_to_quant
            if python and not arguments.compile and mode == "plain":
                theirs = convert_to_quant(python, name, shape)
                if theirs is not None:
                    one["convert_to_quant"] = theirs
                    print(ctq_line(name, one, theirs, weight.size), flush=True)
    if not arguments.convert_to_quant:
        print("convert_to_quant is left out: name its interpreter with --convert-to-quant PYTHON")
    if arguments.json:
        report = {"weights": weight.size, "environment": environment(), "formats": results}
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
