"""How fast does `inspect --deep` read a file, and how much memory does it take?

python benchmarks/health.py [--json FILE] [--workdir DIR] [--gigabytes 2] [--threads 1,2] [--runs 3]

Builds a bfloat16 checkpoint with the names and widths of Flux.1-dev in DIR (a temporary folder by
default), quantizes it to q4_k_s beside it, and deletes both. Each run is a process of its own whose
anonymous memory is sampled 50 times a second. The page cache is warm: what is measured is work, not
the disk. Rates are bytes of the file by wall time, the median of the runs after one that is thrown
away; `MB/s` is 10^6 bytes. `cpu` is processor seconds, which a busy machine does not change much.

Peers: `sha256sum` for one hash (ours takes two, of the file and of its data); a loop over
safetensors' tensors with torch.isnan and torch.isinf, which says NaN and Inf and no more; and the
same with the other counts of ours as torch writes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux_shaped import HIDDEN, blocks_for, build, flux_shapes
from peak_memory import environment, mib, run, watch


def deep(job: dict[str, Any]) -> dict[str, Any]:
    from diffquant.inspect.health import health
    from diffquant.inspect.subject import open_subject

    start = time.perf_counter()
    with open_subject(job["file"]) as subject:
        report = health(subject, workers=job["threads"])
    return {"seconds": time.perf_counter() - start, "verdict": report.verdict}


def hashes(job: dict[str, Any]) -> dict[str, Any]:
    from diffquant.inspect.hashes import hash_paths

    start = time.perf_counter()
    hash_paths([job["file"]], workers=job["threads"])
    return {"seconds": time.perf_counter() - start}


def values(job: dict[str, Any]) -> dict[str, Any]:
    """The numbers alone: no file is named for hashing."""
    from diffquant.inspect import health_values

    health_values.weight_files = lambda _source: ()
    return deep(job)


def torch_isnan(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors import safe_open

    torch.set_num_threads(job["threads"])
    start, bad = time.perf_counter(), 0
    with safe_open(job["file"], "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(key)
            bad += int(torch.isnan(tensor).sum()) + int(torch.isinf(tensor).sum())
    return {"seconds": time.perf_counter() - start, "bad": bad}


def torch_all(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors import safe_open

    torch.set_num_threads(job["threads"])
    start, found = time.perf_counter(), []
    with safe_open(job["file"], "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(key).float()
            size = tensor.abs()
            found.append(
                (
                    int(torch.isnan(tensor).sum()),
                    int(torch.isinf(tensor).sum()),
                    int((tensor == 0).sum()),
                    int((size > 65504).sum()),
                    int((size <= 2.0**-25).sum()),
                    float(tensor.min()),
                    float(tensor.max()),
                    float(tensor.std()),
                    int((tensor.reshape(len(tensor), -1) != 0).any(1).sum()),
                )
            )
    return {"seconds": time.perf_counter() - start, "tensors": len(found)}


WORK: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "inspect --deep": deep,
    "  its numbers alone": values,
    "inspect --hash": hashes,
    "torch: isnan, isinf": torch_isnan,
    "torch: all counts": torch_all,
}


def sha256sum(file: Path) -> dict[str, Any]:
    done = watch(["sha256sum", str(file)])
    peak = done.peak.anonymous()
    return {"seconds": done.seconds, "cpu_s": done.cpu_s, "anonymous_nbytes": peak}


def measure(name: str, file: Path, threads: int, runs: int) -> dict[str, Any]:
    from peak_memory import child_seconds

    rows = []
    for _ in range(runs + 1):
        if name == "sha256sum":
            rows.append(sha256sum(file))
            continue
        before = child_seconds()
        row = run({"name": name, "file": str(file), "threads": threads}, __file__)
        rows.append({**row, "cpu_s": child_seconds() - before})
    kept = rows[1:]
    nbytes = file.stat().st_size
    seconds = statistics.median(row["seconds"] for row in kept)
    return {
        "name": name,
        "file": file.suffix[1:],
        "threads": threads,
        "seconds": seconds,
        "mb_s": nbytes / seconds / 1e6,
        "cpu_s": statistics.median(row["cpu_s"] for row in kept),
        "anonymous_nbytes": max(row["anonymous_nbytes"] or 0 for row in kept),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", type=json.loads)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(WORK[args.child["name"]](args.child)))
        return
    threads = [int(one) for one in args.threads.split(",")]
    with tempfile.TemporaryDirectory(dir=args.workdir) as folder:
        plain, packed = Path(folder) / "model.safetensors", Path(folder) / "model.gguf"
        nbytes = build(plain, flux_shapes(HIDDEN, *blocks_for(args.gigabytes * 1e9)))
        quantize = ("-m", "diffquant", "quantize", "-q", "--verify", "none", "-t", "q4_k_s")
        watch([sys.executable, *quantize, str(plain), "-o", str(packed)])
        rows = [
            measure(name, file, count, args.runs)
            for file in (plain, packed)
            for name in ("sha256sum", *WORK)
            if file is plain or not name.startswith("torch")
            for count in (threads if name != "sha256sum" else (1,))
        ]
    print(f"{'':22} {'file':12} threads {'MB/s':>7} {'s':>7} {'cpu s':>7} {'anon MiB':>9}")
    for row in rows:
        print(
            f"{row['name']:22} {row['file']:12} {row['threads']:7} {row['mb_s']:7.0f} "
            f"{row['seconds']:7.2f} {row['cpu_s']:7.2f} {mib(row['anonymous_nbytes']):>9}"
        )
    if args.json:
        report = {"environment": environment(), "nbytes": nbytes, "rows": rows}
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
