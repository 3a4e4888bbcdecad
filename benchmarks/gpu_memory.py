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

Order: what matters most first, for --minutes stops before the run that would not end in time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peak_memory import environment, mib
from random_weights import Model

GIB = 1 << 30
PREFIX = "gpu_memory-"  # and the process that wrote it
TARGET, TOLERANCE = 1.25, 1e-4
# CLIP and T5 fill up what a prompt leaves of their 77 and 512 tokens, Qwen does not.
SHORT, LONG = "a red fox in the snow", "a red fox in the snow, " * 30


@dataclass(frozen=True)
class Run:
    """One row.

    Attributes:
        name: as --runs takes it.
        level: of a rung; "" for a cap.
        stay: share of the blocks that stay on the device, at level blocks.
        pinned: whether streamed weights wait in page-locked memory.
        decoder: how the autoencoder works.
        cap: GiB in all, context included; the planner chooses.
        tiny_vae: decode with TAESD.
        offload: level that the planner is held to under a cap.
    """

    name: str
    level: str = ""
    stay: float = 0.0
    pinned: bool = False
    decoder: str = "whole"
    cap: float = 0.0
    tiny_vae: bool = False
    offload: str = "auto"


RUNGS = {
    run.name: run
    for run in (
        Run("none", "none"),
        Run("model", "model"),
        Run("blocks", "blocks", pinned=True),
        Run("blocks half", "blocks", stay=0.5, pinned=True),
        Run("blocks file", "blocks"),
        Run("sequential", "sequential", pinned=True),
        Run("sequential file", "sequential"),
        Run("sequential strips", "sequential", pinned=True, decoder="strips"),
        Run("sequential host", "sequential", pinned=True, decoder="host"),
    )
}
CAPS = {
    ("sd15", "bf16"): (Run("cap 2", cap=2),),
    ("sdxl", "bf16"): (
        Run("cap 4", cap=4),
        Run("none tiny", "none", tiny_vae=True),
        Run("cap 1 tiny", cap=1, tiny_vae=True, offload="sequential"),
    ),
    ("flux1", "q4_k_s"): (Run("cap 6", cap=6),),
    ("qwen_image", "q4_k_s"): (Run("cap 8", cap=8),),
}
ALL = ("none", "blocks", "model", "sequential", "blocks half", "blocks file", "sequential file")
FULL, BRIEF = ALL, ("none", "blocks")
# The small exact case: SD1.5 at 256 pixels in float32, on every rung there is.
EXACT = ("none", "model", "blocks", "blocks half", "blocks file", "sequential strips")
EXACT += ("sequential host", "sequential file")
# (family, type) in the order they are worth: caps are of bf16 or q4_k_s.
ORDER = {
    "sd15": {
        "bf16": FULL,
        "f32": EXACT,
        "q4_k_s": FULL,
        "q8_0": BRIEF,
        "fp8_scaled": BRIEF,
        "nf4": BRIEF,
    },
    "sdxl": {"bf16": FULL, "q4_k_s": FULL, "q8_0": BRIEF, "fp8_scaled": BRIEF, "nf4": BRIEF},
    "flux1": {
        "q4_k_s": FULL,
        "bf16": ("none", "blocks", "model", "sequential"),
        "q8_0": BRIEF,
        "fp8_scaled": BRIEF,
        "nf4": BRIEF,
    },
    "qwen_image": {
        "q4_k_s": ("none", "blocks", "model", "sequential", "blocks file"),
        "bf16": ("none", "blocks"),
        "q8_0": BRIEF,
        "fp8_scaled": BRIEF,
        "nf4": BRIEF,
    },
}
# Of a picture: the first is not counted. All runs of a type take as many, and end alike.
STEPS = {"sd15": 6, "sdxl": 6, "flux1": 6, "qwen_image": 4}
EXACT_STEPS = 3
PLAN_LIMIT = 0.15


class OutOfTime(Exception):
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
            raise OutOfTime(f"{what}: {left:.0f} s left, the longest took {self.longest:.0f}")
        yield
        self.longest = max(self.longest, time.monotonic() - begun)


# --- the device ----------------------------------------------------------------------------------


class Device:
    """What is measured on a device; on a CPU, seconds alone."""

    def __init__(self, name: str) -> None:
        import torch

        self.torch, self.name = torch, name
        self.cuda = name == "cuda"
        self.bus = 0.0
        if self.cuda:
            self.total = torch.cuda.get_device_properties(0).total_memory
            self.bus = self._bus()

    def reset_peak(self) -> None:
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()

    def sync(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def clean(self) -> None:
        gc.collect()
        if self.cuda:
            self.torch.cuda.empty_cache()
        self.reset_peak()

    @property
    def context(self) -> int:
        """Bytes of the device that no allocator of the framework counts."""
        if not self.cuda:
            return 0
        free, total = self.torch.cuda.mem_get_info()
        return int(total - free - self.torch.cuda.memory_reserved())

    def peak(self) -> dict[str, int | None]:
        if not self.cuda:
            return dict.fromkeys(("allocated_nbytes", "reserved_nbytes", "context_nbytes"))
        found = {
            "allocated_nbytes": self.torch.cuda.max_memory_allocated(),
            "reserved_nbytes": self.torch.cuda.max_memory_reserved(),
            "context_nbytes": self.context,
        }
        found["total_nbytes"] = found["reserved_nbytes"] + found["context_nbytes"]
        return found

    @contextlib.contextmanager
    def capped(self, nbytes: int) -> Iterator[None]:
        """Leave the allocator what a card of so many bytes would have beside the context."""
        if not self.cuda or not nbytes:
            yield
            return
        share = max(nbytes - self.context, 1) / self.total
        self.torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
        try:
            yield
        finally:
            self.torch.cuda.set_per_process_memory_fraction(1.0)

    def _bus(self) -> float:
        """Bytes per second from page-locked memory to the device, median of seven copies."""
        from diffquant.runtime.memory.pinned import pin

        nbytes = GIB // 2
        host = pin(nbytes)
        there = self.torch.empty(nbytes, dtype=self.torch.uint8, device="cuda")
        seconds = []
        for _ in range(8):
            start = time.perf_counter()
            there.copy_(host.tensor, non_blocking=True)
            self.torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        host.free()
        return nbytes / statistics.median(seconds[1:])


@dataclass
class Copied:
    """Bytes that streams have begun to bring to a slot."""

    nbytes: int = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        from diffquant.runtime.memory import stream

        opened, counter = stream.open_lane, self

        def open_lane(*args: Any, **kwargs: Any) -> Any:
            lane = opened(*args, **kwargs)
            start = lane.start

            def counted(group: Any, slot: int) -> None:
                counter.nbytes += group.nbytes
                start(group, slot)

            lane.start = counted
            return lane

        stream.open_lane = open_lane
        try:
            yield
        finally:
            stream.open_lane = opened


# --- one run -------------------------------------------------------------------------------------


@dataclass
class Opened:
    """An opened pipeline, what it draws, and what its first run gave."""

    pipeline: Any
    model: Model
    type: str
    pixels: int
    steps: int
    first: dict[str, Any] = field(default_factory=dict)


def request_for(held: Opened, steps: int) -> Any:
    from diffquant.runtime.request import PictureRequest

    qwen = held.model.family == "qwen_image"
    words = LONG if qwen and not held.model.tiny else SHORT
    negative = words if qwen else None  # both predictions see as many tokens
    side = held.pixels
    return PictureRequest(words, negative, seed=0, steps=steps, width=side, height=side)


def rung_of(run: Run, found: Any) -> Any:
    from diffquant.runtime.memory.plan import Rung

    resident = {
        stage.part: int(len(stage.weights.blocks) * run.stay)
        for stage in found.stages
        if run.stay and stage.weights.blocks
    }
    return Rung(run.level, run.decoder, run.pinned, resident)


def placed(opened: Any, request: Any, run: Run, device: Device, ram: int) -> dict[str, Any]:
    """Place the weights as the run says, and what was planned."""
    from diffquant.convert.footprint import CONTEXT_NBYTES
    from diffquant.runtime.memory.budget import Asked
    from diffquant.runtime.memory.planning import footprint_of, place, plan_run
    from diffquant.runtime.memory.rungs import host_nbytes, stage_peaks

    if run.level:
        found = footprint_of(opened, request)
        rung = rung_of(run, found)
        opened.placement.settle(rung)
        peaks = stage_peaks(found, rung, device=device.name)
        host = host_nbytes(found, rung, device=device.name)
        why: tuple[str, ...] = ()
    else:
        vram = int(run.cap * GIB) if device.cuda else None
        plan = plan_run(opened, request, Asked(vram=vram, ram=ram, offload=run.offload))
        place(opened, plan)
        rung, peaks, host, why = plan.rung, plan.peaks, plan.host_nbytes, plan.why
    worst = max(peaks, key=lambda one: one.total)
    return {
        "rung": asdict(rung),
        "planned_nbytes": worst.total,
        "planned_context_nbytes": CONTEXT_NBYTES[device.name],
        "planned_host_nbytes": host,
        "decided_by": f"{worst.stage}: {worst.title}",
        "stages": {f"{p.stage} {p.part}": [p.weights, p.activations, p.scratch] for p in peaks},
        "why": why,
    }


def drawn(opened: Any, request: Any, device: Device, copied: Copied) -> dict[str, Any]:
    """Make a picture; seconds of every phase and step, bytes copied per step."""
    pipeline = opened.pipeline
    ticks, bytes_then = [], []

    def tick(*_: int) -> None:
        device.sync()
        ticks.append(time.perf_counter())
        bytes_then.append(copied.nbytes)

    start = time.perf_counter()
    left = pipeline.denoise(request, on_start=tick, on_step=tick)
    before = time.perf_counter()
    images = pipeline.decode(left.latents)
    device.sync()
    end = time.perf_counter()
    steps = [b - a for a, b in zip(ticks, ticks[1:], strict=False)]
    moved = [b - a for a, b in zip(bytes_then, bytes_then[1:], strict=False)]
    return {
        "encode_s": ticks[0] - start,
        "first_step_s": steps[0],
        "step_s": statistics.median(steps[1:] or steps),
        "steps_s": steps,
        "decode_s": end - before,
        "streamed_nbytes": int(statistics.median(moved[1:] or moved)),
        "latents": left.latents.float().cpu(),
        "images": images,
    }


def measured(held: Opened, run: Run, device: Device, ram: int) -> dict[str, Any]:
    """One row."""
    opened = held.pipeline
    request = request_for(held, held.steps)
    opened.placement.release()
    device.clean()
    copied, steps_before = Copied(), len(opened.placement.steps)
    with device.capped(int(run.cap * GIB)), copied.counting():
        row = placed(opened, request, run, device, ram)
        if run.level == "none":
            drawn(opened, request_for(held, 1), device, copied)
            device.sync()
            device.reset_peak()
        found = drawn(opened, request, device, copied)
        row |= device.peak()
    latents, images = found.pop("latents"), found.pop("images")
    row |= found
    row["went_down"] = opened.placement.steps[steps_before:]
    row["finite"] = bool(latents.isfinite().all() and images.isfinite().all())
    _compare(row, held, run, latents, images)
    _bound(row, held, run, device)
    row["cap_nbytes"] = int(run.cap * GIB)
    if row["allocated_nbytes"]:
        row["planned_over_allocated"] = row["planned_nbytes"] / row["allocated_nbytes"]
    return row


def _compare(row: dict[str, Any], held: Opened, run: Run, latents: Any, images: Any) -> None:
    """Against the first run of these weights."""
    kept = held.first.setdefault("made", (latents, images, run.name))
    row["compared_with"] = kept[2]
    row["latents_differ"] = float((latents - kept[0]).abs().max())
    row["picture_differs"] = float((images - kept[1]).abs().max())
    row["latents_largest"] = float(latents.abs().max())


def _bound(row: dict[str, Any], held: Opened, run: Run, device: Device) -> None:
    """How near a streamed step is to what bus and arithmetic allow."""
    if run.level == "none":
        held.first["step_s"] = row["step_s"]
    inside = held.first.get("step_s")
    if inside is None:
        return
    row["x_in_memory"] = row["step_s"] / inside
    if device.bus:
        row["floor_s"] = row["streamed_nbytes"] / device.bus
        row["x_bound"] = row["step_s"] / max(row["floor_s"], inside)


# --- all runs ------------------------------------------------------------------------------------


@contextlib.contextmanager
def pipeline_of(
    model: Model, path: Path, added: dict[str, Path], device: Device, *, dtype: str
) -> Iterator[Any]:
    """Open a pipeline as the command does, weights left in their files."""
    from diffquant.runtime.opening import open_pipeline

    with contextlib.ExitStack() as files:
        opened = open_pipeline(
            path,
            base=model.example if model.tiny else None,
            added=added,
            dtype=getattr(device.torch, dtype),
            device=device.name,
            files=files,
        )
        try:
            yield opened
        finally:
            assert opened.placement is not None
            opened.placement.release()  # page-locked memory is given back by nobody else


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
        one_type(arguments, model, report, device, added, kind)
        if arguments.peers and kind == "bf16":
            peers(arguments, model, report, device)


def one_type(
    arguments: argparse.Namespace,
    model: Model,
    report: Report,
    device: Device,
    added: dict[str, Path],
    kind: str,
) -> None:
    with report.within_time(f"{model.family} {kind}"):
        started = time.monotonic()
        path = model.write_denoiser(kind)
        nbytes, wrote = path.stat().st_size, time.monotonic() - started
    print(f"{model.family} {kind}: {nbytes / GIB:.2f} GiB written in {wrote:.0f} s", flush=True)
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
    common |= {"denoiser_nbytes": nbytes, "wrote_s": wrote}
    with precise(device, exact), pipeline_of(model, path, added, device, dtype=dtype) as opened:
        held = Opened(opened, model, kind, pixels, steps)
        for run in (run for run in runs if usable(run, device)):
            one_run(arguments, report, held, run, device, common)
    if apart:
        other = {**added, "vae": model.write_tiny_vae()}
        with pipeline_of(model, path, other, device, dtype=dtype) as opened:
            held = Opened(opened, model, kind, pixels, steps)
            for run in apart:
                one_run(arguments, report, held, run, device, common)
    path.unlink()


@contextlib.contextmanager
def precise(device: Device, wanted: bool) -> Iterator[None]:
    """Without TF32, whose rounding differs with the shapes that strips have."""
    cudnn = device.torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = before and not wanted
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def one_run(
    arguments: argparse.Namespace,
    report: Report,
    held: Opened,
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


def peers(
    arguments: argparse.Namespace, model: Model, report: Report, device: Device
) -> None:
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
    wanted = arguments.peer_modes.split(",") if arguments.peer_modes else None
    for mode in modes_of(model.family):
        if wanted is not None and mode not in wanted:
            continue
        with report.within_time(f"{model.family}, diffusers {mode}"):
            row = {"family": model.family, "type": "bf16", "run": f"diffusers {mode}"}
            row |= peer.measured(mode)
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
    if "planned_nbytes" in row:
        line += f"{mib(row['planned_nbytes'] + row['planned_context_nbytes']):>6} "
        line += number(row.get("planned_over_allocated"), 7, 3)
        line += number(row.get("floor_s"), 7, 4)
        line += number(row.get("x_in_memory"), 6, 2) + number(row.get("x_bound"), 7, 2)
        line += f" {row['latents_differ']:.1e} {row['picture_differs']:.1e}"
        line += f" as {row['compared_with']}"
    print(line + "".join(f"\n      {one}" for one in remarks(row)), flush=True)


def number(value: float | None, width: int, digits: int) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>{width}} "


def remarks(row: dict[str, Any]) -> Iterator[str]:
    """What a reader must not miss."""
    yield from row.get("went_down", ())
    if row.get("cap_nbytes"):
        rung, total = row["rung"], row.get("total_nbytes")
        fits = "" if total is None else "kept" if total <= row["cap_nbytes"] else "BROKEN"
        yield f"cap {mib(row['cap_nbytes'])} MiB {fits}, by {rung['level']}, {rung['decoder']}"
        yield from row["why"][-3:]
    if abs(row.get("planned_over_allocated", 1) - 1) > PLAN_LIMIT:
        yield f"plan more than {PLAN_LIMIT:.0%} off, decided by {row['decided_by']}"
    if not row.get("finite", True):
        yield "NOT FINITE"
    if row["run"] == "blocks" and row.get("x_bound", 0) > TARGET:
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
    remove_left()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as the command
    device = Device(arguments.device)
    found = {"environment": environment(), "bus_bytes_per_s": device.bus, "rows": []}
    if device.cuda:
        found["device"] = device.torch.cuda.get_device_name()
        found["torch"] = device.torch.__version__
        print(f"{found['device']}, bus {device.bus / 1e9:.1f} GB/s to the device")
    report = Report(arguments, found)
    print(HEAD)
    try:
        for name in arguments.families.split(","):
            place, prefix = folder_with_room(arguments.workdir), f"{PREFIX}{os.getpid()}-"
            with tempfile.TemporaryDirectory(dir=place, prefix=prefix) as folder:
                family(arguments, Model(name, Path(folder), arguments.tiny), report, device)
    except OutOfTime as reached:
        print(f"stopped before {reached}", flush=True)
        found["stopped"] = str(reached)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    failed = [row for row in found["rows"] if "failed" in row and "diffusers" not in row["run"]]
    raise SystemExit(f"{len(failed)} of {len(found['rows'])} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
