"""How fast does a checkpoint become a packed file, against other programs on the same file?

python benchmarks/convert_file.py [--json FILE] [--workdir DIR] [--gigabytes 2] [--repeats 5]
    [--types q4_k_s,q8_0] [--verify load,tensors] [--threads 2] [--large GIGABYTES]
    [--sdcpp-python PATH] [--gguf-editor-python PATH] [--convert-to-quant-python PATH]

Builds a bfloat16 checkpoint with the names and widths of Flux.1-dev and fewer blocks, in DIR (a
temporary folder by default), and deletes it afterwards. A run is a process of its own, from its
start to its end: interpreter, imports, header and fsync included. Runs of one type take turns, so
that a busy moment hits all alike; a first turn warms the page cache and the compiled kernels and is
thrown away. Seconds are medians; the ratio is of medians. `CPU s` is processor time, which says
more than the clock when others use the machine. Anonymous memory is that of the process and its
children, sampled 50 times a second: what was allocated, without the page cache.

Peers, each in an environment of its own, named by its interpreter:
    stable-diffusion-cpp-python==0.4.7 (its `convert`, K types with an importance matrix of ones)
    gguf-editor==0.1.2 (`gguf_editor quantize`, likewise)
    convert_to_quant==1.3.4 (its `--simple` modes: fp8_scaled, int8_rowwise, mxfp8, nvfp4)
Neither syncs what it wrote or reads it again: `--verify load` is what compares with them.
`error` is the relative RMSE over rows of eight matrices of the output against the source.

--large GIGABYTES also quantizes a file of that size once per type, for its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux_shaped import HIDDEN, blocks_for, build, flux_shapes
from peak_memory import environment, mib, watch

SAMPLED_TENSORS = 8
SAMPLED_ROWS = 64
# stable-diffusion.h, enum sd_type_t; leejet/stable-diffusion.cpp as carried by the 0.4.7 sdist
SDCPP_TYPES = {"q4_k_s": 12, "q8_0": 8, "q6_k": 14, "q5_k_s": 13}
SDCPP = """
import sys
from stable_diffusion_cpp import stable_diffusion_cpp as lib
ok = lib.convert(sys.argv[1].encode(), b"", sys.argv[2].encode(), int(sys.argv[3]), b"", False)
sys.exit(0 if ok else 1)
"""
Command = Callable[[str, Path, Path], list[str]]
HEAD = (
    f"{'program':24} {'type':7} {'s':>6} {'s, all':22} {'CPU s':>6} {'MB/s':>5} {'anon MiB':>8} "
    f"{'output MB':>9} {'error':>7} {'x peer':>8}"
)


def ours(verify: str, threads: int) -> Command:
    def command(kind: str, source: Path, out: Path) -> list[str]:
        return [
            *(sys.executable, "-m", "diffquant", "quantize", str(source), "-o", str(out)),
            *("-t", kind, "--verify", verify, "--threads", str(threads), "--force", "-q"),
        ]

    return command


def sdcpp(python: str) -> Command:
    def command(kind: str, source: Path, out: Path) -> list[str]:
        return [python, "-c", SDCPP, str(source), str(out), str(SDCPP_TYPES[kind])]

    return command


def gguf_editor(python: str, threads: int) -> Command:
    def command(kind: str, source: Path, out: Path) -> list[str]:
        name = kind.removesuffix("_s")
        return [
            *(python, "-m", "gguf_editor", "quantize", "-m", str(source), "-o", str(out)),
            *("--type", name, "--device", "cpu", "-t", str(threads)),
        ]

    return command


CONVERT_TO_QUANT = {
    "fp8_scaled": (),
    "int8_rowwise": ("--int8", "--scaling_mode", "row"),
    "mxfp8": ("--mxfp8",),
    "nvfp4": ("--nvfp4",),
}


def convert_to_quant(python: str) -> Command:
    """Its plain mode; without a list of exclusions it packs every linear layer."""

    def command(kind: str, source: Path, out: Path) -> list[str]:
        return [
            *(python, "-m", "convert_to_quant.convert_to_quant", "-i", str(source)),
            *("-o", str(out), "--simple", "--comfy_quant", "--low-memory", "--device", "cpu"),
            *CONVERT_TO_QUANT[kind],
        ]

    return command


def version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def one_run(command: list[str], out: Path) -> dict[str, Any]:
    os.sync()  # what an earlier run left to write is not this one's cost
    done = watch(command, errors=subprocess.STDOUT)
    if done.code:
        raise SystemExit(f"{command}: exit code {done.code}\n{done.output}")
    return {
        "seconds": done.seconds,
        "cpu_s": done.cpu_s,
        "anonymous_nbytes": done.peak.anonymous(),
        "resident_nbytes": done.peak.resident,
        "output_nbytes": out.stat().st_size,
    }


def sampled_error(source: Path, out: Path) -> float:
    """Relative RMSE over the first rows of the eight largest matrices, spread over the file."""
    from diffquant.convert.binding import bind
    from diffquant.io import open_source
    from diffquant.quant.metrics import ErrorStats

    stats = ErrorStats()
    with open_source(source) as before, open_source(out) as after:
        plain, packed = bind(before), bind(after)
        names = {key.removeprefix("model.diffusion_model."): key for key in packed.tensors}
        matrices = [key for key, one in plain.tensors.items() if len(one.shape) == 2]
        for key in matrices[:: max(len(matrices) // SAMPLED_TENSORS, 1)]:
            rows = 0, min(SAMPLED_ROWS, plain.tensors[key].shape[0])
            stats.add(plain.read(key, rows), packed.read(names[key], rows))
    return stats.relative_rmse


def show(one: dict[str, Any]) -> None:
    every = " ".join(f"{seconds:.1f}" for seconds in one["runs_s"])
    print(
        f"{one['program']:24} {one['type']:7} {one['seconds']:6.2f} {every:22} "
        f"{one['cpu_s']:6.1f} {one['mb_s']:5.0f} {mib(one['anonymous_nbytes']):>8} "
        f"{one['output_nbytes'] / 1e6:9.0f} {one['error']:7.4f} "
        + (f"{one['ratio']:8.1f}" if one.get("ratio") else ""),
        flush=True,
    )


def measure_type(
    kind: str, programs: dict[str, Command], source: Path, repeats: int
) -> list[dict[str, Any]]:
    """Every program on one file in turns; the first turn is not reported."""
    nbytes = source.stat().st_size
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
    errors: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, command in programs.items():
            suffix = "safetensors" if kind in CONVERT_TO_QUANT else "gguf"
            out = source.with_name(f"out.{suffix}")
            found = one_run(command(kind, source, out), out)
            print(
                f"turn {turn}: {name} {kind} {found['seconds']:.1f} s, {found['cpu_s']:.1f} CPU s",
                file=sys.stderr,
                flush=True,
            )
            if turn:
                runs[name].append(found)
            else:
                errors[name] = sampled_error(source, out)
            out.unlink()
    rows = []
    for name, found in runs.items():
        seconds = statistics.median(one["seconds"] for one in found)
        rows.append(
            {
                "program": name,
                "type": kind,
                "seconds": seconds,
                "runs_s": [one["seconds"] for one in found],
                "cpu_s": statistics.median(one["cpu_s"] for one in found),
                "mb_s": nbytes / 1e6 / seconds,
                "anonymous_nbytes": max(one["anonymous_nbytes"] or 0 for one in found),
                "resident_nbytes": max(one["resident_nbytes"] for one in found),
                "output_nbytes": found[0]["output_nbytes"],
                "error": errors[name],
            }
        )
    peers = ("sd.cpp", "convert_to_quant")
    against = next((row["seconds"] for row in rows if row["program"] in peers), None)
    for row in rows:
        if against is not None and row["program"] not in peers:
            row["ratio"] = against / row["seconds"]
        show(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--large", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--types", default="q4_k_s,q8_0")
    parser.add_argument("--verify", default="load,tensors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sdcpp-python")
    parser.add_argument("--convert-to-quant-python")
    parser.add_argument("--gguf-editor-python")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
        report = measure(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = {"environment": environment(), "peers": {}, "runs": [], "large": []}
    programs = {
        f"diffquant, verify {verify}": ours(verify, arguments.threads)
        for verify in arguments.verify.split(",")
    }
    if python := arguments.sdcpp_python:
        programs["sd.cpp"] = sdcpp(python)
        report["peers"]["sd.cpp"] = version(python, "stable-diffusion-cpp-python")
    if python := arguments.gguf_editor_python:
        programs["gguf-editor"] = gguf_editor(python, arguments.threads)
        report["peers"]["gguf-editor"] = version(python, "gguf-editor")
    if python := arguments.convert_to_quant_python:
        programs["convert_to_quant"] = convert_to_quant(python)
        report["peers"]["convert_to_quant"] = version(python, "convert_to_quant")
    source = built(folder, arguments.gigabytes, report)
    print(HEAD)
    for kind in arguments.types.split(","):
        report["runs"] += measure_type(kind, programs, source, arguments.repeats)
    source.unlink()
    if arguments.large:
        source = built(folder, arguments.large, report)
        mine = {name: one for name, one in programs.items() if name.startswith("diffquant")}
        for kind in arguments.types.split(","):
            report["large"] += large(kind, mine, source)
    return report


def large(kind: str, programs: dict[str, Command], source: Path) -> list[dict[str, Any]]:
    rows = []
    for name, command in programs.items():
        out = source.with_name("out.gguf")
        found = one_run(command(kind, source, out), out)
        found |= {"program": name, "type": kind, "runs_s": [found["seconds"]]}
        found |= {"mb_s": source.stat().st_size / 1e6 / found["seconds"]}
        found |= {"error": sampled_error(source, out)}
        out.unlink()
        show(found)
        rows.append(found)
    return rows


def built(folder: Path, gigabytes: float, report: dict[str, Any]) -> Path:
    source = folder / "flux.safetensors"
    double, single = blocks_for(gigabytes * 1e9)
    start = time.perf_counter()
    nbytes = build(source, flux_shapes(HIDDEN, double, single))
    report.setdefault("sources", []).append(
        {"nbytes": nbytes, "double_blocks": double, "single_blocks": single}
    )
    print(
        f"source: {nbytes / 1e9:.2f} GB bf16, {double} double and {single} single blocks of width "
        f"{HIDDEN}, built in {time.perf_counter() - start:.0f} s"
    )
    return source


if __name__ == "__main__":
    main()
