"""Peak memory of a job in a process of its own: what the memory benchmarks share.

A benchmark calls `run(job, script)`: the script is started again with `--child JSON`, does the job
and prints one line of JSON. Meanwhile its anonymous memory (what it allocated, without the page
cache) is sampled 50 times a second from /proc; elsewhere psutil gives resident memory alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
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
            found = memory_of(self.process.pid)
            if found is not None:
                self.samples.append((time.monotonic(), found[0]))
                self.resident = max(self.resident, found[1])
            time.sleep(SAMPLE_S)

    def anonymous(self, until: float = math.inf) -> int | None:
        """Highest anonymous memory before a moment of the system's monotonic clock."""
        found = [nbytes for at, nbytes in self.samples if nbytes is not None and at <= until]
        return max(found, default=None)


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


def run(job: dict[str, Any], script: str) -> dict[str, Any]:
    """Run one job in a process of its own, with its peak memory."""
    command = [sys.executable, script, "--child", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.get("threads", 1))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        peak = Peak(process)
        peak.start()
        assert process.stdout is not None
        output = process.stdout.read()
        process.wait()
        peak.join()
    if process.returncode:
        raise SystemExit(f"{job}: exit code {process.returncode}")
    result = json.loads(output.splitlines()[-1])
    return {
        **job,
        **result,
        "anonymous_nbytes": peak.anonymous(),
        "stream_anonymous_nbytes": peak.anonymous(result.pop("stream_end", math.inf)),
        "resident_nbytes": peak.resident,
    }


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
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def mib(nbytes: float | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 2**20:.0f}"
