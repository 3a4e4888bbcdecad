"""What does one pass for three types save against three runs, and what does it take?

python benchmarks/several_types.py [--json FILE] [--workdir DIR] [--gigabytes 2]
    [--manifest sdxl-base.checkpoint.ldm] [--types q8_0,q4_k_s,fp8_scaled] [--threads 2]
    [--verify tensors] [--repeat 3]

Builds a bfloat16 checkpoint with the names and widths of Flux.1-dev and fewer blocks, in DIR (a
temporary folder by default), or one with the names and shapes of a manifest of tests/data. Each run
is a process of its own: wall time, processor time (all threads, without the start; what counts on a
busy machine), bytes that reads of the source asked for (counted where files are read, so a second
read counts though the page cache serves it), and anonymous memory, sampled 50 times a second. A
first run warms page cache and compiled kernels and is not reported; the order of the two ways
alternates.
"""

from __future__ import annotations

import argparse
import json
import lzma
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from flux_shaped import HIDDEN, blocks_for, build, flux_shapes
from peak_memory import environment, mib, run

MANIFESTS = Path(__file__).parents[1] / "tests" / "data" / "manifests.json.xz"
SUFFIX = {"gguf": ".gguf", "safetensors": ".safetensors"}


def child(text: str) -> None:
    """Quantize to some types; one of them is an ordinary run, several are one pass."""
    from diffquant.convert.jobs import run_job
    from diffquant.convert.plan import Request
    from diffquant.convert.several import Wanted, run_jobs
    from diffquant.io.reading import RandomFile
    from diffquant.quant.types import type_named

    job = json.loads(text)
    source, lock, read = Path(job["source"]), threading.Lock(), RandomFile.read
    asked = {"source": 0}

    def counted(self: RandomFile, offset: int, nbytes: int) -> Any:
        if self.path == source:
            with lock:
                asked["source"] += nbytes
        return read(self, offset, nbytes)

    RandomFile.read = counted  # type: ignore[method-assign]
    wanted = []
    for name in job["types"]:
        kind = type_named(name)
        container = next(iter(kind.dialects))
        path = Path(job["folder"]) / f"{name}{SUFFIX[container]}"
        wanted.append(Wanted(path, Request(container, type=kind)))
    common: Any = {"force": True, "workers": job["threads"], "verify": job["verify"]}
    start, busy = time.perf_counter(), time.process_time()
    if len(wanted) == 1:
        alone = run_job(source, wanted[0].path, wanted[0].request, **common)
        planned, weights = alone.peak_nbytes, alone.read_nbytes
    else:
        several = run_jobs(source, wanted, **common)
        planned, weights = several.peak_nbytes, several.read_nbytes
    seconds, processor = time.perf_counter() - start, time.process_time() - busy
    result = {
        "seconds": seconds,
        "processor_seconds": processor,
        "source_read_nbytes": asked["source"],
        "planned_read_nbytes": weights,
        "planned_nbytes": planned,
        "output_nbytes": sum(one.path.stat().st_size for one in wanted),
    }
    for one in wanted:
        one.path.unlink()
    print(json.dumps(result))


def show(label: str, one: dict[str, Any], source: int, base: float) -> None:
    print(
        f"{label:34} {one['seconds']:7.1f} {base / one['seconds']:6.2f} "
        f"{one['processor_seconds']:7.1f} "
        f"{one['source_read_nbytes'] / 1e9:8.2f} {one['source_read_nbytes'] / source:7.2f} "
        f"{mib(one['anonymous_nbytes']):>6} {mib(one['planned_nbytes']):>6}",
        flush=True,
    )


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = folder / "source.safetensors"
    if arguments.manifest:
        shapes = json.loads(lzma.decompress(MANIFESTS.read_bytes()))[arguments.manifest]
    else:
        shapes = flux_shapes(HIDDEN, *blocks_for(arguments.gigabytes * 1e9))
    nbytes = build(source, shapes)
    types = arguments.types.split(",")
    print(f"source: {nbytes / 1e9:.2f} GB, {arguments.threads} threads, verify {arguments.verify}")

    def job(names: list[str]) -> dict[str, Any]:
        return run(
            {
                "types": names,
                "source": str(source),
                "folder": str(folder),
                "threads": arguments.threads,
                "verify": arguments.verify,
            },
            __file__,
        )

    job(types)  # warm-up
    runs: dict[str, list[dict[str, Any]]] = {"together": [], **{name: [] for name in types}}
    for turn in range(arguments.repeat):
        order = [types, *([name] for name in types)]
        for names in order if turn % 2 == 0 else order[::-1]:
            runs["together" if len(names) > 1 else names[0]].append(job(names))
    middle = {
        label: sorted(found, key=lambda one: one["seconds"])[len(found) // 2]
        for label, found in runs.items()
    }
    for label, found in runs.items():
        anonymous = [one["anonymous_nbytes"] for one in found if one["anonymous_nbytes"]]
        middle[label]["anonymous_nbytes"] = max(anonymous, default=None)
    alone = [middle[name] for name in types]
    apart = {
        "seconds": sum(statistics.median(one["seconds"] for one in runs[name]) for name in types),
        "processor_seconds": sum(one["processor_seconds"] for one in alone),
        "source_read_nbytes": sum(one["source_read_nbytes"] for one in alone),
        "anonymous_nbytes": max(one["anonymous_nbytes"] or 0 for one in alone) or None,
        "planned_nbytes": max(one["planned_nbytes"] for one in alone),
    }
    print(
        f"{'run':34} {'s':>7} {'times':>6} {'cpu s':>7} {'read GB':>8} {'x size':>7} {'anon':>6} "
        f"{'plan':>6}"
    )
    for name in types:
        show(name, middle[name], nbytes, apart["seconds"])
    show(f"{len(types)} runs", apart, nbytes, apart["seconds"])
    show("one pass", middle["together"], nbytes, apart["seconds"])
    return {"environment": environment(), "source_nbytes": nbytes, "runs": runs, "apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--manifest", help="name in tests/data/manifests.json.xz")
    parser.add_argument("--types", default="q8_0,q4_k_s,fp8_scaled")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verify", default="tensors", choices=("none", "load", "tensors"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
        report = measure(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
