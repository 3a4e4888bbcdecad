"""What a picture takes on a GPU, and what less memory costs: every family, type and rung.

python benchmarks/gpu_memory.py [--families sd15,sdxl,flux1,qwen_image] [--types TYPE,...]
    [--runs NAME,...] [--no-peers] [--minutes N] [--ram GIB] [--workdir DIR] [--json FILE]
python benchmarks/gpu_memory.py --device cpu --tiny       every branch, in a minute, no GPU

Models of real names and shapes with random weights (random_weights.py), written to files and
opened as the command does: denoiser, autoencoder and all text encoders, `open_pipeline(files=...)`,
`plan_run`, `place`. So the weights really come through the file, and the planner is the product's.

A run is a rung or a cap. A rung is placed as it is named, decoding whole: in memory, one part at a
time, blocks with none or half of them staying, layer by layer; streamed from page-locked memory,
or from the file. A cap gives the planner a budget (`Asked(vram=...)`), and the framework's
allocator what is left of it beside the context (set_per_process_memory_fraction): whoever takes
more gets an error, as on a smaller card, and the steps down the ladder are shown.

    encode   until the first step, text encoders brought from the file included
    step     median of all but the first, which brings the weights and learns their order
    decode   the autoencoder's bringing included, where parts come one at a time
    MiB      max_memory_reserved + context; context = used on the device - reserved, that is what
             the driver, kernels and libraries hold and no framework counts
    plan     the planner's peak, its fixed allowance for the context included; beside it what it
             plans without, over max_memory_allocated: the number to judge its arithmetic by
    floor    bytes that were really copied per step / speed of the bus, measured first; a streamed
             step takes at least the larger of that and the step in memory. `x bound` is over that
             bound: where copies and work overlap, it is near 1 (target: 1.25)
    same     largest difference of the latents, and of the picture, from the first run of the
             same weights, usually that in memory; 0 is bit-equal. float32 (type f32: SD1.5 at 256
             pixels, without TF32) is to stay below 1e-4

The run in memory goes first and once beforehand, which compiles its kernels: no other row has that
in its encoding. Page-locked memory is filled anew for every run; that is in the first step, and
shown. Peers (diffusers_peers.py) run in the same process on weights of the same shapes in bfloat16.

Order (memory_runs.py): what matters most first. --minutes stops before a run that may not end in
time, taking the longest so far for a guess; the JSON is written after every row, and a run that
fails is a row. Files go to /dev/shm or the disk, whichever has more room, and are removed. A whole
Qwen-Image needs 70 GiB of host memory with the files, and 16 GiB less without its peers.
Each file of the benchmark: random_weights.py the files, memory_row.py one run, gpu_device.py what
is measured, diffusers_peers.py and diffusers_models.py the peers (diffusers, accelerate and, for
its GGUF, gguf have to be installed; without, it says so and goes on).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_device import GIB, Device
from memory_row import Held, measured, pipeline_of, precise
from memory_runs import CAPS, EXACT_STEPS, ORDER, RUNGS, STEPS, Run
from peak_memory import environment, mib, version
from random_weights import Model

PREFIX = "gpu_memory-"  # and the process that wrote it
TARGET, TOLERANCE, PLAN_LIMIT = 1.25, 1e-4, 0.15


class OutOfTimeError(Exception):
    """The next run would not end in time."""


@dataclass
class Report:
    """Rows so far; written after each."""

    arguments: argparse.Namespace
    found: dict[str, Any]
    start: float = field(default_factory=time.monotonic)
    longest: float = 5.0

    def add(self, row: dict[str, Any]) -> None:
        self.found["rows"].append(row)
        self.found["seconds"] = round(time.monotonic() - self.start, 1)
        if self.arguments.json:
            self.arguments.json.write_text(json.dumps(self.found, indent=1))

    @contextlib.contextmanager
    def within_time(self, what: str) -> Iterator[None]:
        """Run what may take as long as the longest so far; else stop here."""
        begun = time.monotonic()
        left = self.arguments.minutes * 60 - (begun - self.start)
        if left < self.longest:
            raise OutOfTimeError(f"{what}: {left:.0f} s left, the longest took {self.longest:.0f}")
        yield
        self.longest = max(self.longest, time.monotonic() - begun)


# --- all runs ------------------------------------------------------------------------------------


def names(arguments: argparse.Namespace, listed: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(one for one in listed if not arguments.runs or one in arguments.runs.split(","))


def usable(run: Run, device: Device) -> bool:
    """A CPU has no page-locked memory to differ, and no maps beside it."""
    return device.cuda or run.decoder != "host"


def family(arguments: argparse.Namespace, model: Model, report: Report, device: Device) -> None:
    """Every type of a family: the files are written, run, and removed."""
    wanted = arguments.types.split(",") if arguments.types else list(ORDER[model.family])
    started = time.monotonic()
    added = model.write_companions()
    print(f"{model.family}: companions written in {time.monotonic() - started:.0f} s", flush=True)
    for kind in (one for one in ORDER[model.family] if one in wanted):
        with going_on(report, model, kind):
            one_type(arguments, model, report, device, added, kind)
        if arguments.peers and kind == "bf16":
            with going_on(report, model, "diffusers"):
                peers(arguments, model, report, device)


@contextlib.contextmanager
def going_on(report: Report, model: Model, what: str) -> Iterator[None]:
    """Make a row of what fails: the device's time is dear, the other rows go on."""
    try:
        yield
    except OutOfTimeError:
        raise
    except Exception as error:
        row = {"family": model.family, "type": what, "run": "all that is left"}
        row |= {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        report.add(row)
        show(row)


def one_type(
    arguments: argparse.Namespace,
    model: Model,
    report: Report,
    device: Device,
    added: dict[str, Path],
    kind: str,
) -> None:
    """Write the denoiser in a type, run it, remove it."""
    path = model.denoiser(kind)
    try:
        with report.within_time(f"{model.family} {kind}"):
            started = time.monotonic()
            model.write_denoiser(kind)
            wrote, size = time.monotonic() - started, path.stat().st_size / GIB
        print(f"{model.family} {kind}: {size:.2f} GiB written in {wrote:.0f} s", flush=True)
        runs_of_type(arguments, model, report, device, added, kind)
    finally:
        path.unlink(missing_ok=True)


def runs_of_type(
    arguments: argparse.Namespace,
    model: Model,
    report: Report,
    device: Device,
    added: dict[str, Path],
    kind: str,
) -> None:
    """Every run with a denoiser that was written."""
    path = model.denoiser(kind)
    exact = kind == "f32"
    pixels = 64 if model.tiny else 256 if exact else 512 if model.family == "sd15" else 1024
    steps = EXACT_STEPS if exact else STEPS[model.family]
    runs = [RUNGS[name] for name in names(arguments, ORDER[model.family][kind])]
    caps = CAPS.get((model.family, kind), ())
    caps = tuple(run for run in caps if run.name in names(arguments, (run.name,)))
    runs[1:1] = [run for run in caps if not run.tiny_vae]
    apart = [run for run in caps if run.tiny_vae]
    dtype = "float32" if exact else arguments.dtype
    common = {"family": model.family, "type": kind, "pixels": pixels, "dtype": dtype}
    common["denoiser_nbytes"] = path.stat().st_size
    with precise(device, exact), pipeline_of(model, path, added, device, dtype=dtype) as opened:
        held = Held(opened, model, kind, pixels, steps)
        for run in (run for run in runs if usable(run, device)):
            one_run(arguments, report, held, run, device, common)
    if apart:
        other = {**added, "vae": model.write_tiny_vae()}
        with pipeline_of(model, path, other, device, dtype=dtype) as opened:
            held = Held(opened, model, kind, pixels, steps)
            for run in apart:
                one_run(arguments, report, held, run, device, common)


def one_run(
    arguments: argparse.Namespace,
    report: Report,
    held: Held,
    run: Run,
    device: Device,
    common: dict[str, Any],
) -> None:
    with report.within_time(f"{held.model.family} {held.type}, {run.name}"):
        row: dict[str, Any] = {**common, "run": run.name}
        try:
            row |= measured(held, run, device, int(arguments.ram * GIB))
        except Exception as error:  # the device's time is dear: the other rows go on
            row["failed"] = f"{type(error).__name__}: {error}"
            row["traceback"] = traceback.format_exc()
    report.add(row)
    show(row)


def peers(arguments: argparse.Namespace, model: Model, report: Report, device: Device) -> None:
    from diffusers_peers import Peer, modes_of, reason_against

    why = reason_against()
    if why:
        print(f"no peers: {why}", flush=True)
        report.found["no_peers"] = why
        return
    with report.within_time(f"{model.family}, weights of the peers"):
        started = time.monotonic()
        peer = Peer(model, device)
        print(f"{model.family}: weights made in {time.monotonic() - started:.0f} s", flush=True)
    inside = None
    wanted = arguments.peer_modes.split(",") if arguments.peer_modes else None
    for mode in modes_of(model.family):
        if wanted is not None and mode not in wanted:
            continue
        with report.within_time(f"{model.family}, diffusers {mode}"):
            row = {"family": model.family, "type": "bf16", "run": f"diffusers {mode}"}
            row |= peer.measured(mode)
            if mode == "in memory":
                inside = row.get("step_s")
            if inside is not None and "step_s" in row:
                row["x_in_memory"] = row["step_s"] / inside
        report.add(row)
        show(row)
    peer.close()


# --- the table -----------------------------------------------------------------------------------

HEAD = (
    f"{'family type, run':38} {'encode':>7} {'first':>7} {'step':>8} {'decode':>7} {'MiB':>6} "
    f"{'plan':>6} {'p/alloc':>7} {'floor':>7} {'x mem':>6} {'x bound':>7}  same"
)


def show(row: dict[str, Any]) -> None:
    name = f"{row['family']} {row['type']}, {row['run']}"
    if "failed" in row:
        print(f"{name:38} FAILED {row['failed'][:300]}\n{row.get('traceback', '')}", flush=True)
        return
    line = f"{name:38} {row['encode_s']:7.2f} {row['first_step_s']:7.2f} {row['step_s']:8.4f} "
    line += f"{row['decode_s']:7.2f} {mib(row.get('total_nbytes')):>6} "
    planned = row.get("planned_nbytes")
    whole = None if planned is None else planned + row["planned_context_nbytes"]
    line += f"{mib(whole):>6} {number(row.get('planned_over_allocated'), 7, 3)}"
    line += number(row.get("floor_s"), 7, 4)
    line += number(row.get("x_in_memory"), 6, 2) + number(row.get("x_bound"), 7, 2)
    if planned is not None:
        line += f" {row['latents_differ']:.1e} {row['picture_differs']:.1e}"
        line += f" as {row['compared_with']}"
    print(line + "".join(f"\n      {one}" for one in remarks(row)), flush=True)


def number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>{width}} "


def remarks(row: dict[str, Any]) -> Iterator[str]:
    """What a reader must not miss."""
    yield from row.get("went_down", ())
    if row.get("cap_nbytes"):
        rung, total = row["ended_at"], row.get("total_nbytes")
        fits = "" if total is None else "kept" if total <= row["cap_nbytes"] else "BROKEN"
        yield f"cap {mib(row['cap_nbytes'])} MiB {fits}, by {rung['level']}, {rung['decoder']}"
        yield from row["why"][-3:]
    if abs(row.get("planned_over_allocated", 1) - 1) > PLAN_LIMIT:
        yield f"plan more than {PLAN_LIMIT:.0%} off, decided by {row['decided_by']}"
    if not row.get("finite", True):
        yield "NOT FINITE"
    rung = row.get("rung", {})
    if rung.get("level") == "blocks" and rung["pinned"] and row.get("x_bound", 0) > TARGET:
        yield f"over {TARGET} of the bound"
    if row["type"] == "f32":
        worst = max(row["latents_differ"], row["picture_differs"])
        if worst > TOLERANCE:
            yield f"differs by more than {TOLERANCE}"


def folder_with_room(wanted: Path | None) -> Path:
    """Where files are written: memory where there is most of it, else the disk."""
    if wanted is not None:
        return wanted
    places = [one for one in (Path("/dev/shm"), Path(tempfile.gettempdir())) if one.is_dir()]
    return max(places, key=lambda one: shutil.disk_usage(one).free)


def remove_left() -> None:
    """Remove files of a run that was killed: they may lie in memory."""
    for place in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        for left in place.glob(f"{PREFIX}*"):
            if not Path(f"/proc/{left.name.split('-')[1]}").exists():
                shutil.rmtree(left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="shapes of examples/, 64 pixels")
    parser.add_argument("--families", default=",".join(ORDER))
    parser.add_argument("--types", default="", help="of ORDER, and f32: the exact case of sd15")
    parser.add_argument("--runs", default="", help="names of rungs and caps")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer-modes", default="")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--ram", type=float, default=64.0, help="GiB that weights may wait in")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes the files
    remove_left()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the command
    device = Device(arguments.device)
    versions = {name: version(name) for name in ("torch", "diffusers", "accelerate", "triton")}
    found = {"environment": environment(), "versions": versions, "rows": []}
    found["bus_bytes_per_s"] = device.bus
    if device.cuda:
        found["device"] = device.torch.cuda.get_device_name()
        print(f"{found['device']}, bus {device.bus / 1e9:.1f} GB/s to the device")
    report = Report(arguments, found)
    print(HEAD)
    try:
        for name in arguments.families.split(","):
            place, prefix = folder_with_room(arguments.workdir), f"{PREFIX}{os.getpid()}-"
            with tempfile.TemporaryDirectory(dir=place, prefix=prefix) as folder:
                family(arguments, Model(name, Path(folder), arguments.tiny), report, device)
    except OutOfTimeError as reached:
        print(f"stopped before {reached}", flush=True)
        found["stopped"] = str(reached)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    failed = [row for row in found["rows"] if "failed" in row and "diffusers" not in row["run"]]
    raise SystemExit(f"{len(failed)} of {len(found['rows'])} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
