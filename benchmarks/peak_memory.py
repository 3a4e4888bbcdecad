"""Peak memory of a job in a process of its own: what the memory benchmarks share.

A benchmark calls `run(job, script)`: the script is started again with `--child JSON`, does the job
and prints one line of JSON. Or it calls `watch(command)` for any program. Meanwhile the anonymous
memory (what it allocated, without the page cache) of the process and its children is sampled 50
times a second from /proc; elsewhere psutil gives resident memory alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "numba", "llvmlite", "torch", "gguf", "pywhispercpp")
SAMPLE_S = 0.02


class Peak(threading.Thread):
    """Highest anonymous and resident memory of a process, sampled until it ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.process = process
        self.samples: list[tuple[float, int | None]] = []
        self.resident = 0

    def run(self) -> None:
        while self.process.poll() is None:
            found = [one for one in map(memory_of, family(self.process.pid)) if one is not None]
            if found:
                anonymous = [one for one, _ in found if one is not None]
                self.samples.append((time.monotonic(), sum(anonymous) if anonymous else None))
                self.resident = max(self.resident, sum(one for _, one in found))
            time.sleep(SAMPLE_S)

    def anonymous(self, until: float = math.inf) -> int | None:
        """Highest anonymous memory before a moment of the system's monotonic clock."""
        found = [nbytes for at, nbytes in self.samples if nbytes is not None and at <= until]
        return max(found, default=None)


def family(pid: int) -> list[int]:
    """The process and all its descendants; itself alone where there is no /proc."""
    found = [pid]
    for one in found:  # grows while it is walked
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found.extend(map(int, children.read_text().split()))
    return found


def memory_of(pid: int) -> tuple[int | None, int] | None:
    """Anonymous and resident bytes; psutil and no anonymous share where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmHWM"))
    except (FileNotFoundError, ProcessLookupError, KeyError):
        pass
    import psutil

    try:
        return None, psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return None


@dataclass(frozen=True, slots=True)
class Watched:
    """A finished program: exit code, wall and processor time, output, memory while it ran."""

    code: int
    seconds: float
    cpu_s: float
    output: str
    peak: Peak


def watch(
    command: list[str], env: dict[str, str] | None = None, *, errors: int | None = None
) -> Watched:
    """Run a program to its end and sample its memory; `errors` is Popen's stderr."""
    start, before = time.perf_counter(), child_seconds()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
    ) as process:
        peak = Peak(process)
        peak.start()
        assert process.stdout is not None
        output = process.stdout.read()
        process.wait()
        seconds = time.perf_counter() - start
        peak.join()
    return Watched(process.returncode, seconds, child_seconds() - before, output, peak)


def child_seconds() -> float:
    """Processor time of all children that have ended."""
    found = os.times()
    return found.children_user + found.children_system


def run(job: dict[str, Any], script: str) -> dict[str, Any]:
    """Run one job in a process of its own, with its peak memory."""
    command = [sys.executable, script, "--child", json.dumps(job)]
    done = watch(command, {**os.environ, "OMP_NUM_THREADS": str(job.get("threads", 1))})
    if done.code:
        raise SystemExit(f"{job}: exit code {done.code}")
    result = json.loads(done.output.splitlines()[-1])
    return {
        **job,
        **result,
        "anonymous_nbytes": done.peak.anonymous(),
        "stream_anonymous_nbytes": done.peak.anonymous(result.pop("stream_end", math.inf)),
        "resident_nbytes": done.peak.resident,
    }


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip() or None,
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def mib(nbytes: float | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 2**20:.0f}"
