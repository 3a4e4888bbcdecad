"""Run commands over damaged files in one limited process; a JSON line for each broken promise.

python worker.py SAMPLES WORK SEED FIRST COUNT

Each case is told by (SEED, index) alone: it works in WORK, by relative names. Promises: the exit
code is a documented one, nobody sees a traceback or an internal error, nothing takes longer than
`CPU_S` of processor time, memory stays under the limit, and no file of the name `canary` appears.
The last line counts exit codes and says how much memory was used.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import mutations
from click.testing import CliRunner

from diffquant.cli.main import cli

CPU_S = 20  # on a busy machine too
WALL_S = 200  # for what waits and does nothing
ADDRESS_SPACE = 6 << 30
DOCUMENTED = {0, 1, 2, 3, 4, 5}  # 6 is "not enough memory": no small file may cause it


class _TooLong(BaseException):
    pass


def _alarm(_signal: int, _frame: object) -> None:
    raise _TooLong


def commands(path: str, rng: random.Random, out: str) -> Iterator[list[str]]:
    """What is run on one file."""
    yield ["inspect", *rng.choice(([], ["--explain"], ["--json"], ["-q"])), path]
    if rng.random() < 0.2:
        yield ["inspect", "--audit", *rng.choice(([], ["--full"], ["--json"])), path]
    if rng.random() < 0.2:
        yield ["inspect", "--deep", "--threads", "2", *rng.choice(([], ["--json"])), path]
    if rng.random() < 0.1:
        yield ["inspect", "--hash", path]
    if rng.random() < 0.2:
        program = rng.choice(("comfyui", "comfyui-gguf", "forge", "diffusers", "sdcpp"))
        yield ["inspect", "--for", program, path]
    if rng.random() < 0.2:
        size = rng.choice(([], ["--size", "512x768"], ["--size", "1024x1024", "--batch", "2"]))
        yield ["inspect", "--vram", "8GiB", *size, path]
    if rng.random() < 0.1:
        yield ["inspect", "--with", path, path]
    if rng.random() < 0.15:
        arch = rng.choice(([], ["--arch", "generic"], ["--arch", "generic", "--allow-requantize"]))
        kind, ending = rng.choice(
            (("q4_k_s", "gguf"), ("fp8_scaled", "safetensors"), ("nf4", "safetensors"))
        )
        yield ["quantize", path, "-o", f"{out}.{ending}", "-t", kind, "--dry-run", *arch]
    if rng.random() < 0.15:
        target = rng.choice((".safetensors", ".gguf", ""))
        arch = rng.choice(([], ["--arch", "generic"]))
        yield ["convert", path, f"{out}{target}", "--dtype", "f16", "--dry-run", *arch]
    if "imatrix" in path or rng.random() < 0.02:
        yield ["imatrix", "show", path]


def run(arguments: list[str]) -> tuple[int, str]:
    """Exit code (-1: it took too long, -2: an exception came out) and what was printed."""
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    signal.alarm(WALL_S)
    try:
        ran = CliRunner().invoke(cli, arguments, prog_name="diffquant")
    except _TooLong:
        return -1, traceback.format_exc(limit=-12)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        text = "".join(traceback.format_exception(ran.exception))
        return (-1 if isinstance(ran.exception, _TooLong) else -2), text[-3000:]
    return ran.exit_code, ran.output + ran.stderr


def broken(code: int, text: str, canary: Path) -> str:
    """Which promise is broken, or ""."""
    if canary.exists():
        canary.unlink()
        return "code was run"
    if code not in DOCUMENTED:
        return f"exit code {code}"
    if "Traceback" in text or "internal error" in text or "RuntimeWarning" in text:
        return "internal error"
    if "\x1b" in text:
        return "escape sequence printed"
    return ""


def main() -> None:
    samples = Path(sys.argv[1]).resolve()
    os.chdir(sys.argv[2])  # names inside damaged files must not depend on where this runs
    seed, first, count = (int(text) for text in sys.argv[3:6])
    signal.signal(signal.SIGALRM, _alarm)
    signal.signal(signal.SIGPROF, _alarm)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    loaded = {path.name: mutations.load(path) for path in sorted(samples.iterdir())}
    canary = Path("canary")
    codes: collections.Counter[int] = collections.Counter()
    slowest = (0.0, "")
    for index in range(first, first + count):
        rng = random.Random(f"{seed}:{index}")
        name = rng.choice(sorted(loaded))
        files = dict(loaded[name])
        what = mutations.mutate(files, rng, canary)
        folder = Path(f"{index}-{name}")
        for relative, content in files.items():
            content.write(folder / relative)
        entry = next((p for p in sorted(folder.glob("main*")) if "-0000" not in p.name), folder)
        kept = False
        for arguments in commands(str(entry), rng, "out"):
            start = time.perf_counter()
            code, text = run(arguments)
            slowest = max(slowest, (time.perf_counter() - start, f"{index} {' '.join(arguments)}"))
            codes[code] += 1
            why = broken(code, text, canary)
            if why:
                kept = True
                row = {"index": index, "sample": name, "did": what, "ran": arguments, "why": why}
                print(json.dumps({**row, "text": text[-3000:]}), flush=True)
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"codes": dict(codes), "peak_mib": _peak_mib(), "slowest": slowest}))


def _peak_mib() -> int:
    """Peak resident memory; ru_maxrss would be that of the process that started this one too."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) >> 10


if __name__ == "__main__":
    with contextlib.redirect_stderr(io.StringIO()):  # log lines of the commands
        main()
