"""One step of a denoiser on a GPU: as it is and compiled, every type, beside diffusers.

python benchmarks/gpu_step.py [--families flux1,sdxl,qwen_image] [--types bf16,q4_k_s,...]
    [--peers bf16,...] [--modes eager,compiled,captured] [--rounds N] [--minutes N]
    [--warm FAMILY:TYPE,...] [--profile FAMILY:TYPE:MODE,...] [--json FILE]
python benchmarks/gpu_step.py --device cpu --tiny --backend aot_eager    every branch, no GPU

Real shapes, random weights (step_models.py), a picture of 1024 pixels. A step is one prediction:
Flux.1 with 512 tokens of text, SDXL guided (a batch of two), Qwen-Image once with 512 tokens (its
guided step is twice that). Rows of a family are made in one process, diffusers' bfloat16 first.

    ms       median of --rounds (7), device synchronised before and after, three thrown away
    x        over diffusers' bfloat16 as it is, in this run; `x own` over our bfloat16, same mode
    first    seconds of the first call: compiled, with an empty cache of the compiler's; the call
             as it is compiles Triton's kernels
    MiB      max_memory_reserved while steps are timed: weights, activations
    captured as it is, replayed as one CUDA graph: what is timed first runs as it is, then records
    error    of the prediction, relative to the exact one of the same weights (type@compute rows)
    warm     `--warm`: first compiled call in another process, which finds the first one's cache

`--profile` prints where a step spends its time: kernels by time on the device, and the CPU's total
beside the device's: a step with more CPU time than device time is bound by launches.
--minutes stops before a row that may not end in time; the JSON is written after every row, and a
row that fails is a row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peak_memory import environment, mib, version

TYPES = (
    "bf16", "q4_k_s", "q8_0", "nf4", "fp8_scaled", "int8_rowwise",
    # type@compute: products in 8 bits (runtime/low_bit.py)
    "fp8_scaled@fp8", "q4_k_s@fp8", "nf4@fp8", "bf16@fp8",
    "int8_rowwise@int8", "int8_convrot@int8", "q8_0@int8",
)  # fmt: skip
PEERS = ("bf16", "gguf q4_k", "gguf q8_0", "bnb nf4")
FAMILIES = ("flux1", "sdxl", "qwen_image")
DISCARDED = 3
TOP = 16
PROFILED = 3


class Run:
    """Rows so far, and the time that is left."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.start = time.monotonic()
        self.longest = 5.0
        self.found: dict[str, Any] = {"environment": environment(), "rows": [], "profiles": []}
        names = ("torch", "diffusers", "triton", "gguf", "bitsandbytes")
        self.found["versions"] = {name: version(name) for name in names}

    def keep(self) -> None:
        if self.arguments.json:
            self.arguments.json.write_text(json.dumps(self.found, indent=1))

    @property
    def left(self) -> float:
        return float(self.arguments.minutes * 60 - (time.monotonic() - self.start))

    def row(self, named: dict[str, str], work: Callable[[], dict[str, Any]]) -> bool:
        """Make a row, if there is time for one as long as the longest; whether there was."""
        if self.left < self.longest:
            self.found.setdefault("left_out", []).append(named)
            print(f"no time for {' '.join(named.values())}", flush=True)
            return False
        begun, row = time.monotonic(), dict(named)
        try:
            row |= work()
        except Exception as error:  # the device's time is dear: the other rows go on
            row |= {"failed": f"{type(error).__name__}: {error}"[:500]}
            row["traceback"] = traceback.format_exc()
        self.longest = max(self.longest, time.monotonic() - begun)
        self.found["rows"].append(row)
        self._compare(row)
        self.keep()
        show(row)
        return True

    def _compare(self, row: dict[str, Any]) -> None:
        for name, program, mode in (
            ("x", "diffusers", "eager"),
            ("x_own", "diffquant", row["mode"]),
        ):
            base = [
                one["ms"]
                for one in self.found["rows"]
                if (one["family"], one["program"], one["type"], one["mode"])
                == (row["family"], program, "bf16", mode)
                and "ms" in one
            ]
            if base and "ms" in row:
                row[name] = row["ms"] / base[0]


def timed(step: Callable[[], Any], device: Any, rounds: int) -> dict[str, Any]:
    """First call, then the median of the others."""
    seconds = []
    for index in range(1 + DISCARDED + rounds):
        if index == 1:
            device.reset_peak()
        device.sync()
        start = time.perf_counter()
        out = step()
        device.sync()
        seconds.append(time.perf_counter() - start)
    measured = seconds[1 + DISCARDED :]
    return {
        "first_s": seconds[0],
        "ms": statistics.median(measured) * 1e3,
        "least_ms": min(measured) * 1e3,
        "rounds_ms": [one * 1e3 for one in measured],
        "finite": bool(out.isfinite().all()),
        **device.peak(),
    }


def modes(arguments: argparse.Namespace) -> list[str]:
    known = ("eager", "compiled", "captured")
    return [mode for mode in known if mode in arguments.modes.split(",")]


def family_rows(run: Run, family: str, device: Any) -> None:
    arguments = run.arguments
    peers = [one for one in PEERS if one in arguments.peers.split(",")]
    types = [one for one in TYPES if one in arguments.types.split(",")]
    for kind in peers[:1]:
        peer_rows(run, family, kind, device)
    for kind in types:
        our_rows(run, family, kind, device)
    for kind in peers[1:]:
        if family != "sdxl" or not kind.startswith("gguf"):  # diffusers has no GGUF of UNets
            peer_rows(run, family, kind, device)


def our_rows(run: Run, family: str, kind: str, device: Any) -> None:
    from step_models import inputs_for, ours, step_of

    from diffquant.runtime.capture import captured
    from diffquant.runtime.compiling import compiled

    arguments = run.arguments
    held: dict[str, Any] = {}

    def made() -> Callable[[], Any]:
        if "step" not in held:
            device.clean()
            start = time.perf_counter()
            name, _, compute = kind.partition("@")
            held["model"] = ours(family, name, device.name, tiny=arguments.tiny)
            inputs = inputs_for(family, device.name, tiny=arguments.tiny)
            held["step"] = step_of(family, held["model"], inputs)
            if not arguments.tiny:
                in_8_bits(held["model"], "exact", tiny=False)
            if compute:
                exact = held["step"]()
                held["low_bit"] = in_8_bits(held["model"], compute, tiny=arguments.tiny)
                gap = (held["step"]() - exact).float().norm() / exact.float().norm()
                held["step_error"] = float(gap)
            held["made_s"] = time.perf_counter() - start
        step: Callable[[], Any] = held["step"]
        return step

    def eager() -> dict[str, Any]:
        step = made()
        return {**timed(step, device, arguments.rounds), "made_s": held["made_s"], **told()}

    def with_graphs() -> dict[str, Any]:
        step = made()
        step()  # Triton's own kernels are there: what is timed first is compiling
        with compiled(held["model"], backend=arguments.backend, least=arguments.least) as state:
            row = timed(step, device, arguments.rounds)
            return row | {"kinds": state.kinds, "blocks": state.blocks, **told()}

    def told() -> dict[str, Any]:
        if "low_bit" not in held:
            return {}
        return {"computed": held["low_bit"].said, "step_error": held["step_error"]}

    def as_one_graph() -> dict[str, Any]:
        step = made()
        with captured(held["model"]) as state:
            row = timed(step, device, arguments.rounds)
            return row | {"graphs": state.graphs, "failed_capture": state.failed}

    work = {"eager": eager, "compiled": with_graphs, "captured": as_one_graph}
    contexts: dict[str, Callable[[], Any]] = {
        "eager": contextlib.nullcontext,
        "compiled": lambda: compiled(
            held["model"], backend=arguments.backend, least=arguments.least
        ),
        "captured": lambda: captured(held["model"]),
    }
    for mode in modes(arguments):
        if mode == "captured" and not device.cuda:
            print("captured: CUDA graphs need a CUDA device", flush=True)
            continue
        named = {"family": family, "program": "diffquant", "type": kind, "mode": mode}
        run.row(named, work[mode])
    for mode, around in contexts.items():
        wanted = f"{family}:{kind}:{mode}" in arguments.profile.split(",")
        if not wanted or run.left < run.longest:
            continue
        try:
            step = made()
            with around():
                profile(run, f"{family} {kind} {mode}", step, device)
        except Exception as error:  # as rows do
            print(f"{family} {kind}: no profile: {type(error).__name__}: {error}", flush=True)
    held.clear()
    device.clean()
    device.torch.compiler.reset()


def in_8_bits(model: Any, compute: str, *, tiny: bool) -> Any:
    """Let a denoiser's blocks multiply in 8 bits; tiny ones by the reference, in any dtype."""
    import torch

    from diffquant.runtime import few_rows, low_bit
    from diffquant.runtime.compute import Engine, card_of

    if not tiny:
        return low_bit.apply(model, compute, card_of("cuda"))
    few_rows.FEW = 3
    engine = Engine(compute, "reference", 0, False, (torch.bfloat16,), "no card")
    return low_bit.assign(model, compute, {compute: engine})


def peer_rows(run: Run, family: str, kind: str, device: Any) -> None:
    from step_models import inputs_for
    from step_peers import missing, peer, peer_step

    if what := missing(kind):
        print(f"no diffusers {kind}: {what} not installed", flush=True)
        run.found.setdefault("no_peers", []).append(f"{kind}: {what}")
        return
    arguments = run.arguments
    held: dict[str, Any] = {}

    def made() -> Callable[[], Any]:
        if "step" not in held:
            device.clean()
            held["model"] = peer(family, kind, device.name, tiny=arguments.tiny)
            inputs = inputs_for(family, device.name, tiny=arguments.tiny)
            held["step"] = peer_step(family, held["model"], inputs)
        step: Callable[[], Any] = held["step"]
        return step

    def with_graphs() -> dict[str, Any]:
        step = made()
        held["model"].compile_repeated_blocks(
            fullgraph=True, dynamic=False, backend=arguments.backend
        )
        return timed(step, device, arguments.rounds)

    work = {"eager": lambda: timed(made(), device, arguments.rounds), "compiled": with_graphs}
    theirs = [mode for mode in modes(arguments) if mode in work]
    for mode in theirs if kind == "bf16" else theirs[:1]:
        named = {"family": family, "program": "diffusers", "type": kind, "mode": mode}
        run.row(named, work[mode])
    held.clear()
    device.clean()
    device.torch.compiler.reset()


def profile(run: Run, name: str, step: Callable[[], Any], device: Any) -> None:
    """Where steps spend their time, once they are warm: per step, of several in a row."""
    torch = device.torch
    for _ in range(DISCARDED + 1):
        step()
    device.sync()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.cuda else []
    with torch.profiler.profile(activities=kinds) as found:
        start = time.perf_counter()
        for _ in range(PROFILED):
            step()
        device.sync()
        wall = (time.perf_counter() - start) * 1e3 / PROFILED
    rows = found.key_averages()
    attribute = "self_device_time_total" if device.cuda else "self_cpu_time_total"
    # kernels themselves, not the operators that launch them, where there is a device
    kernels = [one for one in rows if "CUDA" in str(one.device_type)] if device.cuda else rows
    top = sorted(kernels, key=lambda one: -getattr(one, attribute))[:TOP]
    cpu = sum(one.self_cpu_time_total for one in rows) / 1e3 / PROFILED
    busy = sum(getattr(one, attribute) for one in kernels) / 1e3 / PROFILED
    calls = sum(one.count for one in kernels) // PROFILED
    print(f"\n{name}, profiled: wall {wall:.1f} ms, CPU {cpu:.1f}, {device.name} {busy:.1f} in "
          f"{calls} kernels")  # fmt: skip
    listed = []
    for one in top:
        ms = getattr(one, attribute) / 1e3 / PROFILED
        listed.append({"name": one.key, "ms": ms, "calls": one.count / PROFILED})
        count = one.count // PROFILED
        print(f"  {ms:8.2f} ms {ms / max(busy, 1e-9):6.1%} {count:6} x {one.key[:90]}")
    print(flush=True)
    run.found["profiles"].append(
        {"name": name, "wall_ms": wall, "cpu_ms": cpu, "busy_ms": busy, "kernels": calls}
        | {"top": listed}
    )
    run.keep()


def warm_rows(run: Run) -> None:
    """First compiled call in processes of their own, over the cache that is there by now."""
    for one in filter(None, run.arguments.warm.split(",")):
        family, _, kind = one.partition(":")
        named = {"family": family, "program": "diffquant", "type": kind, "mode": "compiled, warm"}
        run.row(named, lambda family=family, kind=kind: _warm(run.arguments, family, kind))


def _warm(arguments: argparse.Namespace, family: str, kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "warm.json"
        command = [sys.executable, __file__, "--families", family, "--types", kind, "--peers", ""]
        command += ["--modes", "compiled", "--warm", "", "--profile", "", "--json", str(path)]
        command += ["--device", arguments.device, "--backend", arguments.backend, "--rounds", "5"]
        command += ["--least", str(arguments.least)]
        command += ["--tiny"] if arguments.tiny else []
        # its cache is this run's: the variable is set
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-400:]}")
        (row,) = json.loads(path.read_text())["rows"]
        if "failed" in row:
            raise RuntimeError(row["failed"])
        return {key: row[key] for key in ("first_s", "ms", "finite", "kinds", "blocks")}


HEAD = f"{'family, program type, mode':46} {'ms':>9} {'x':>6} {'x own':>6} {'first':>7} {'MiB':>7}"


def show(row: dict[str, Any]) -> None:
    name = f"{row['family']}, {row['program']} {row['type']}, {row['mode']}"
    if "failed" in row:
        print(f"{name:46} FAILED {row['failed']}\n{row['traceback'][-1500:]}", flush=True)
        return
    ratios = " ".join(
        f"{'-' if row.get(one) is None else f'{row[one]:.2f}':>6}" for one in ("x", "x_own")
    )
    memory = mib(row.get("reserved_nbytes"))
    odd = "" if row["finite"] else "  NOT FINITE"
    odd += f"  error {row['step_error']:.2g}" if "step_error" in row else ""
    print(f"{name:46} {row['ms']:9.2f} {ratios} {row['first_s']:7.1f} {memory:>7}{odd}", flush=True)


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """An empty cache for the compiler, unless this process is given one."""
    with tempfile.TemporaryDirectory(prefix="gpu_step-") as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shapes of examples/, 64 pixels")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--modes", default="eager,compiled,captured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--warm", default="flux1:q4_k_s")
    parser.add_argument("--profile", default="flux1:bf16:eager,flux1:q4_k_s:eager,sdxl:bf16:eager")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--least", type=int, default=3, help="blocks that a kind must serve")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error("--rounds: at least 5")
    with empty_cache():
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        from gpu_device import Device

        device, run = Device(arguments.device), Run(arguments)
        if device.cuda:
            run.found["device"] = device.torch.cuda.get_device_name()
            print(run.found["device"])
        print(HEAD)
        with device.torch.no_grad():
            for family in arguments.families.split(","):
                family_rows(run, family, device)
                if arguments.warm.startswith(family):
                    warm_rows(run)
    run.keep()
    failed = [row for row in run.found["rows"] if "failed" in row]
    raise SystemExit(f"{len(failed)} of {len(run.found['rows'])} rows failed" if failed else 0)


if __name__ == "__main__":
    main()
