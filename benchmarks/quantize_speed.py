"""How fast is quantizing from float32, against the peer that defines each format?

python benchmarks/quantize_speed.py [--json FILE] [--rows N] [--columns K] [--formats q4_k,nf4]

Peers, in the same process: ggml's own library for its block types (ctypes on the one that
pywhispercpp 1.5.1 carries), bitsandbytes for nf4, torch expressions for the rest. Both work on
one array; ours and ggml take row chunks of at most 2**20 weights from a thread pool, torch
and bitsandbytes their own threads. A warm-up is thrown away (compilation), then the median of five.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

from diffquant.core.dtypes import STORAGE
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS, QuantFormat
from diffquant.quant.metrics import ErrorStats

CHUNK = 1 << 20
RUNS = 5
THREADS = (1, 2)
PACKAGES = ("numpy", "numba", "torch", "bitsandbytes", "pywhispercpp")


def chunks(weight: np.ndarray) -> list[np.ndarray]:
    rows = max(CHUNK // weight.shape[1], 1)
    return [weight[start : start + rows] for start in range(0, len(weight), rows)]


def median_seconds(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ours(row: QuantFormat, weight: np.ndarray, pool: ThreadPoolExecutor) -> None:
    encode = backend(row.codec, "encode")
    stats = None
    if row.passes == 2:
        reduce = backend(row.codec, "reduce")
        stats = max(pool.map(lambda chunk: reduce(chunk, None, fmt=row.name), chunks(weight)))
    list(pool.map(lambda chunk: encode(chunk, stats, fmt=row.name), chunks(weight)))


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


def ggml(library: ctypes.CDLL, name: str, weight: np.ndarray, pool: ThreadPoolExecutor) -> None:
    storage = STORAGE[name.upper()]
    row_nbytes = weight.shape[1] // storage.block_size * storage.block_nbytes

    def encode(chunk: np.ndarray) -> None:
        out = np.empty((len(chunk), row_nbytes), np.uint8)
        library.ggml_quantize_chunk(
            storage.ggml_id, chunk.ctypes.data, out.ctypes.data, 0, *chunk.shape, None
        )

    list(pool.map(encode, chunks(weight)))


def fp8_scaled(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax() / 448
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def int8_rowwise(weight: torch.Tensor) -> torch.Tensor:
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)
    return (weight / scale).round_().clamp_(-128, 127).to(torch.int8)


TORCH: dict[str, Callable[[torch.Tensor], object]] = {
    "f16": lambda weight: weight.half(),
    "bf16": lambda weight: weight.bfloat16(),
    "fp8_e4m3": lambda weight: weight.to(torch.float8_e4m3fn),
    "fp8_e4m3_scaled": fp8_scaled,
    "int8_rowwise": int8_rowwise,
    "nf4": lambda weight: bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=False, quant_type="nf4"
    ),
}


def peer_of(
    name: str, weight: np.ndarray, pool: ThreadPoolExecutor, library: ctypes.CDLL | None
) -> tuple[str, Callable[[], object]] | None:
    if name in TORCH:
        tensor = torch.from_numpy(weight)
        return "bitsandbytes" if name == "nf4" else "torch", lambda: TORCH[name](tensor)
    if library is not None and name.upper() in STORAGE and STORAGE[name.upper()].is_block:
        return "ggml", lambda: ggml(library, name, weight, pool)
    return None


def error_of(row: QuantFormat, weight: np.ndarray) -> float:
    stats = None
    if row.passes == 2:
        stats = backend(row.codec, "reduce")(weight, None, fmt=row.name)
    parts = backend(row.codec, "encode")(weight, stats, fmt=row.name)
    result = ErrorStats()
    result.add(weight, backend(row.codec, "decode")(parts, weight.shape, fmt=row.name))
    return result.relative_rmse


def measure(row: QuantFormat, weight: np.ndarray, library: ctypes.CDLL | None) -> dict[str, object]:
    millions = weight.size / 1e6
    result: dict[str, object] = {
        "bits": row.nbytes(weight.shape) * 8 / weight.size,
        "error": error_of(row, weight),
    }
    for threads in THREADS:
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(threads) as pool:
            mine = millions / median_seconds(lambda: ours(row, weight, pool))
            result[f"mweights_s_{threads}"] = mine
            peer = peer_of(row.name, weight, pool, library)
            if peer is not None:
                theirs = millions / median_seconds(peer[1])
                result["peer"] = peer[0]
                result[f"peer_mweights_s_{threads}"] = theirs
                result[f"ratio_{threads}"] = mine / theirs
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--formats", help="comma separated; all that compute anything by default")
    arguments = parser.parse_args()
    names = (
        arguments.formats.split(",") if arguments.formats else [n for n in FORMATS if n != "f32"]
    )
    shape = (arguments.rows, arguments.columns)
    weight = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    library = ggml_library()
    results = {}
    print("Mweights/s from float32, median of five; x = ours / peer")
    print(
        f"{'format':16} {'bits':>6} {'error':>8} {'1 thread':>9} {'2':>7}  "
        f"{'peer':12} {'1':>4} {'2':>5} {'x1':>5} {'x2':>5}"
    )
    for name in names:
        one = results[name] = measure(FORMATS[name], weight, library)
        line = f"{name:16} {one['bits']:6.3f} {one['error']:8.3g} "
        line += f"{one['mweights_s_1']:9.0f} {one['mweights_s_2']:7.0f}  "
        if "peer" in one:
            line += (
                f"{one['peer']:12} {one['peer_mweights_s_1']:4.0f} {one['peer_mweights_s_2']:5.0f} "
            )
            line += f"{one['ratio_1']:5.1f} {one['ratio_2']:5.1f}"
        print(line, flush=True)
    if arguments.json:
        report = {"weights": weight.size, "environment": environment(), "formats": results}
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
