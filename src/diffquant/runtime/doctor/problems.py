"""PROBLEMS: what could be better on this machine, each with what to do about it.

A rule looks at the diagnosis and the environment, and says only what is true here and can be
changed. What merely is so (no GPU, no bfloat16) is shown elsewhere and is no problem.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from diffquant.runtime.doctor.machine import Disk
from diffquant.runtime.doctor.report import Diagnosis, Problem

__all__ = ["problems"]

_GIB = 1 << 30
_LITTLE_DISK = 5 * _GIB  # SDXL in q8_0 and its companions take about as much
_WITHOUT: Mapping[str, str] = {
    "torch": "nothing can be generated, verified or calibrated",
    "numba": "the CPU encodes and decodes packed weights in slow reference code",
    "tokenizers": "no prompt can be read",
    "gguf": "IQ formats cannot be read or written",
    "psutil": "free memory is not known, and not checked before work starts",
}
_DISKS: Mapping[str, tuple[str, str]] = {
    "working directory": ("outputs land there", "free some space, or write elsewhere with -o"),
    "temporary files": (
        "--engine sdcpp writes parts of a model there",
        "set TMPDIR to a larger disk",
    ),
}
Rule = Callable[[Diagnosis, Mapping[str, str]], Iterator[Problem]]


def problems(found: Diagnosis, environment: Mapping[str, str] | None = None) -> tuple[Problem, ...]:
    """Everything worth changing, the gravest first.

    Args:
        found: whose own problems are not looked at.
        environment: variables; this process's own where not given.
    """
    variables = os.environ if environment is None else environment
    return tuple(one for rule in _RULES for one in rule(found, variables))


def _broken(found: Diagnosis, _environment: Mapping[str, str]) -> Iterator[Problem]:
    names = {row.name: row for row in found.libraries}
    for one in found.broken:
        row = names.get(one.what)
        if row is not None and not row.version:
            continue  # it is missing, which the next rule says
        if row is not None:
            yield Problem(
                f"{row.name} {row.version} does not load: {one.error}",
                f"pip install --force-reinstall {row.name}",
            )
        else:
            yield Problem(f"{one.what} could not be looked at: {one.error}", _LOOK_AGAIN)


_LOOK_AGAIN = "run again with DIFFQUANT_DEBUG=1, and report it if the reason is not known"


def _missing(found: Diagnosis, _environment: Mapping[str, str]) -> Iterator[Problem]:
    on_nvidia = any(one.kind == "cuda" for one in found.accelerators.found)
    for row in found.libraries:
        without = _WITHOUT.get(row.name)
        if row.name == "triton" and on_nvidia and found.accelerators.built_for.startswith("CUDA"):
            without = "the GPU decodes packed weights with the torch reference"
        if without and not row.version:
            yield Problem(f"{row.name} is not installed: {without}", row.install)


def _gpu(found: Diagnosis, environment: Mapping[str, str]) -> Iterator[Problem]:
    cards = found.accelerators
    if not cards.torch or not cards.driver or any(one.kind == "cuda" for one in cards.found):
        return
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if not cards.built_for.startswith("CUDA"):
        yield Problem(
            f"an NVIDIA driver ({cards.driver}) is here, and torch {cards.torch} is built without "
            "CUDA: the GPU is not used",
            "install torch for CUDA (pytorch.org, Get Started, says how)",
        )
    elif hidden is not None and hidden.strip() in ("", "-1"):
        yield Problem("CUDA_VISIBLE_DEVICES hides every GPU", "unset CUDA_VISIBLE_DEVICES")
    else:
        yield Problem(
            f"NVIDIA driver {cards.driver} is here, and no GPU is usable: {cards.why_none['CUDA']}",
            "update the driver, or install torch for an older CUDA",
        )


def _threads(found: Diagnosis, environment: Mapping[str, str]) -> Iterator[Problem]:
    processor, threads = found.machine.processor, found.accelerators.threads
    if processor is None or threads is None:
        return
    usable = max(round(processor.usable), 1)
    if threads > usable:
        yield Problem(
            f"torch computes with {threads} threads on {usable} usable cores "
            f"({processor.limited_by or 'of this machine'}): they wait for each other",
            f"set OMP_NUM_THREADS={usable}",
        )
    # By default torch takes the physical cores: fewer than that is somebody's setting.
    asked = next((n for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if environment.get(n)), "")
    if asked and threads < min(usable, processor.cores or usable):
        yield Problem(
            f"torch computes with {threads} of {usable} usable cores: {asked} is set",
            f"unset {asked} for the fastest picture",
        )


def _interpreted(found: Diagnosis, environment: Mapping[str, str]) -> Iterator[Problem]:
    if environment.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        yield Problem(
            "NUMBA_DISABLE_JIT is set: encoders and decoders run as plain Python, hundreds of "
            "times slower",
            "unset NUMBA_DISABLE_JIT",
        )
    on_gpu = any(one.kind == "cuda" for one in found.accelerators.found)
    if on_gpu and environment.get("TRITON_INTERPRET", "0") not in ("", "0"):
        yield Problem(
            "TRITON_INTERPRET is set: Triton kernels run on the CPU, element by element",
            "unset TRITON_INTERPRET",
        )


def _room(found: Diagnosis, _environment: Mapping[str, str]) -> Iterator[Problem]:
    """Models that fit in no type."""
    plan = found.planned
    none = [row for row in found.families if all(one.fits is False for one in row.types)]
    if plan.budget is None or not none:
        return
    least = [min(row.types, key=lambda one: one.peak_nbytes) for row in none]
    told = ", ".join(
        f"{row.title} ({one.peak_nbytes / _GIB:.1f} GiB as {one.type})"
        for row, one in zip(none, least, strict=True)
    )
    do = "a smaller picture (--size)"
    if plan.dtype == "float32":
        do += ", --dtype bfloat16, which halves activations"
    encoders = {one.decides for one in least if one.stage == "encode"}
    if encoders:
        do += f", a quantized text encoder ({', '.join(sorted(encoders))}: --add PART=FILE)"
    if plan.device == "cpu":
        do += ", or close other programs"
    yield Problem(
        f"{plan.budget / _GIB:.1f} GiB of {_memory_of(plan.device)} are too little at native size "
        f"for {told}",
        do,
    )


def _memory_of(device: str) -> str:
    return "RAM" if device == "cpu" else f"memory on {device}"


def _disks(found: Diagnosis, _environment: Mapping[str, str]) -> Iterator[Problem]:
    seen: set[tuple[int | None, int | None]] = set()
    for disk in found.machine.disks:
        same = (disk.free, disk.total)
        if disk.free is None or disk.free >= _LITTLE_DISK or same in seen:
            continue
        seen.add(same)
        yield _full(disk, disk.free)


def _full(disk: Disk, free: int) -> Problem:
    why, do = _DISKS.get(disk.what, ("downloads land there", f"set {disk.what} to a larger disk"))
    return Problem(f"{disk.what} ({disk.path}) has {free / _GIB:.1f} GiB free: {why}", do)


_RULES: tuple[Rule, ...] = (_broken, _missing, _gpu, _interpreted, _threads, _room, _disks)
