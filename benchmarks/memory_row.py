"""One row of gpu_memory.py: place the weights, draw a picture, measure, compare with the first."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_device import GIB, Copied, Device
from memory_runs import Run
from random_weights import Model

# CLIP and T5 fill up what a prompt leaves of their 77 and 512 tokens, Qwen does not.
SHORT, LONG = "a red fox in the snow", "a red fox in the snow, " * 30


@dataclass
class Held:
    """An opened pipeline, what it draws, and what its first run gave."""

    pipeline: Any
    model: Model
    type: str
    pixels: int
    steps: int
    first: dict[str, Any] = field(default_factory=dict)


def request_for(held: Held, steps: int) -> Any:
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
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    moved = [b - a for a, b in itertools.pairwise(bytes_then)]
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


def measured(held: Held, run: Run, device: Device, ram: int) -> dict[str, Any]:
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
    row["ended_at"] = asdict(opened.placement.rung)
    row["went_down"] = opened.placement.steps[steps_before:]
    row["finite"] = bool(latents.isfinite().all() and images.isfinite().all())
    _compare(row, held, run, latents, images)
    _bound(row, held, run, device)
    row["cap_nbytes"] = int(run.cap * GIB)
    if row["allocated_nbytes"]:
        row["planned_over_allocated"] = row["planned_nbytes"] / row["allocated_nbytes"]
    return row


def _compare(row: dict[str, Any], held: Held, run: Run, latents: Any, images: Any) -> None:
    """Against the first run of these weights."""
    kept = held.first.setdefault("made", (latents, images, run.name))
    row["compared_with"] = kept[2]
    row["latents_differ"] = float((latents - kept[0]).abs().max())
    row["picture_differs"] = float((images - kept[1]).abs().max())
    row["latents_largest"] = float(latents.abs().max())


def _bound(row: dict[str, Any], held: Held, run: Run, device: Device) -> None:
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
