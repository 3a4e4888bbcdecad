"""Does a model run that is larger than the memory there is?

python benchmarks/little_ram.py [--family flux1] [--type q8_0] [--pixels 256] [--ram 3GiB]
    [--leave GIB] [--workdir DIR] [--json FILE]

A real-size file with random weights (random_weights.py) is written beside its text encoders, and
`diffquant generate` makes one picture in one step from it on the CPU, with --ram. A second process
holds memory so that no more than --leave GiB are free: less than the file has bytes. Printed: peak
anonymous memory of the command (all its processes, sampled), what the plan said, and the asked
bound: the packed size of the two largest blocks and the activations, beside the 200 MiB of the
interpreter, torch and numba (docs/memory.md). Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from peak_memory import environment, mib, watch
from random_weights import Model

GIB = 1 << 30


def hold(nbytes: int, ready: Any, done: Any) -> None:
    """Take memory and keep it."""
    held = bytearray(nbytes)
    for at in range(0, nbytes, 4096):
        held[at] = 1
    ready.set()
    done.wait()


@contextlib.contextmanager
def less_free(leave: float) -> Iterator[int]:
    """Hold what is free but `leave` GiB; yields what is then free."""
    free = psutil.virtual_memory().available
    ready, done = multiprocessing.Event(), multiprocessing.Event()
    taken = max(free - int(leave * GIB), 0)
    process = multiprocessing.Process(target=hold, args=(taken, ready, done), daemon=True)
    process.start()
    ready.wait()
    try:
        yield psutil.virtual_memory().available
    finally:
        done.set()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--family", default="flux1")
    parser.add_argument("--type", default="q8_0")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--ram", default="3GiB")
    parser.add_argument("--leave", type=float, default=8.0)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
        model = Model(arguments.family, Path(folder), tiny=False)
        parts = model.write_companions()
        file = model.write_denoiser(arguments.type)
        added = [word for name, path in parts.items() for word in ("--add", f"{name}={path}")]
        size = f"{arguments.pixels}x{arguments.pixels}"
        out = Path(folder) / "o.png"
        command = [sys.executable, "-m", "diffquant", "generate", str(file), "-p", "a red circle"]
        command += [*added, "--size", size, "--steps", "1", "-o", str(out), "--json"]
        command += ["--ram", arguments.ram]
        with less_free(arguments.leave) as free:
            done = watch(command, dict(os.environ))
        if done.code:
            raise SystemExit(f"exit code {done.code}: {done.output[-500:]}")
        found = json.loads(done.output)["result"]
        plan = found["memory"][0]["plan"]
        row = {
            "family": arguments.family,
            "type": arguments.type,
            "pixels": arguments.pixels,
            "file_nbytes": file.stat().st_size,
            "files_nbytes": sum(one.stat().st_size for one in Path(folder).glob("*.*")),
            "free_nbytes": free,
            "anonymous_nbytes": done.peak.anonymous(),
            "planned_nbytes": plan["peak_nbytes"],
            "rung": plan["rung"],
            "peaks": plan["peaks"],
            "phases": found["phases"],
            "seconds": done.seconds,
            "warnings": found.get("warnings", []),
        }
    print(
        f"{row['family']} {row['type']}: file {mib(row['file_nbytes'])} MiB, all parts "
        f"{mib(row['files_nbytes'])}, free {mib(row['free_nbytes'])}, anonymous "
        f"{mib(row['anonymous_nbytes'])}, planned {mib(row['planned_nbytes'])}, rung "
        f"{row['rung']}, {row['seconds']:.0f} s {row['phases']}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"environment": environment(), "row": row}, indent=1))


if __name__ == "__main__":
    main()
