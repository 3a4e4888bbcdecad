"""Budgets that bits are allocated under: bytes of the file, bits per weight, memory of a device.

Each says what a plan takes of it, to the byte; the allocation is corrected until the plan that will
run takes no more than was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffquant.convert.allocation_part import AllocatedPart
from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.footprint import (
    CONTEXT_NBYTES,
    Footprint,
    Picture,
    footprint,
    with_denoiser,
)
from diffquant.convert.footprint.denoiser import denoise_stage, denoising_nbytes, others_over
from diffquant.convert.footprint.native import native_size
from diffquant.convert.footprint.weights import plan_weights
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import Match
from diffquant.convert.plan import Plan
from diffquant.convert.surroundings import metadata_of, surroundings
from diffquant.core.amounts import bytes_from
from diffquant.core.errors import UsageError
from diffquant.core.tensors import TensorSource
from diffquant.io import file_nbytes

__all__ = ["BUDGETS", "Budget", "Counts", "Measure", "budget_of", "measure_for"]

Counts = Literal["file", "denoiser", "device"]
# What names a budget, and what it counts.
BUDGETS: Mapping[str, Counts] = {"--max-size": "file", "--bpw": "denoiser", "--vram": "device"}
_MAX_BITS = 32.0
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked for.

    Attributes:
        counts: "file": bytes of the whole file; "denoiser": bits per weight of the denoiser, or of
            the part that is written alone; "device": bytes of a device while the denoiser runs.
        value: bytes, or bits per weight.
        text: the option as typed.
        among: formats or types to choose from, empty for the usual ones.
        free_kept: whether layers that types keep are chosen for too, where readers unpack them.
    """

    counts: Counts
    value: float
    text: str
    among: tuple[str, ...] = ()
    free_kept: bool = False


def budget_of(
    option: str, value: str | float, among: Sequence[str] = (), *, free_kept: bool = False
) -> Budget:
    """Read a budget.

    Args:
        option: of BUDGETS.
        value: bits per weight for --bpw, else an amount of bytes.
        among: formats or types to choose from.
        free_kept: as for Budget.

    Raises:
        UsageError: no such amount.
    """
    counts = BUDGETS[option]
    if counts == "denoiser":
        try:
            bits = float(value)
        except ValueError:
            bits = 0.0
        if not 0 < bits <= _MAX_BITS:
            raise UsageError(f"{option} {value}: expected bits per weight, such as 4.6")
        return Budget(counts, bits, f"{option} {bits:g}", tuple(among), free_kept)
    text = str(value).strip()
    return Budget(counts, bytes_from(text, option), f"{option} {text}", tuple(among), free_kept)


@dataclass(frozen=True, slots=True)
class Measure:
    """How much of a budget a plan takes.

    Attributes:
        limit: bytes that may be taken.
        of: plan -> bytes.
        aligned: whether a tensor counts with its padding and header entries.
        notes: what was assumed, given the plan that was chosen.
        per_bit: bytes of one bit per weight, where that is what was asked for.
    """

    limit: int
    of: Callable[[Plan], int]
    aligned: bool
    notes: Callable[[Plan], tuple[str, ...]]
    per_bit: float = 1.0


def measure_for(
    budget: Budget,
    source: TensorSource,
    logical: LogicalSource,
    match: Match,
    part: AllocatedPart,
    *,
    base: Path | None = None,
) -> Measure:
    """The measure of a budget on one part of a source; headers may be filled from `base`.

    Raises:
        UsageError: what the budget counts cannot be told of this source.
    """
    if budget.counts == "file":
        limit = int(budget.value)
        return Measure(limit, lambda plan: _file(plan, match, source, base), True, _nothing)
    if budget.counts == "denoiser":
        weights = sum(_size(shape) for shape in part.match.shapes.values())
        limit = int(budget.value * weights / 8)
        return Measure(limit, lambda plan: _part(plan, part), False, _nothing, weights / 8)
    if part.name != "denoiser":
        raise UsageError(
            f"{budget.text}: it counts the memory of a denoiser's step; give {part.name} "
            "--max-size or --bpw"
        )
    return _device(budget, logical, match)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _nothing(_plan: Plan) -> tuple[str, ...]:
    return ()


def _file(plan: Plan, match: Match, source: TensorSource, base: Path | None) -> int:
    header = surroundings(plan, match, source, base).header
    pairs = metadata_of(plan, match, source, header)
    return file_nbytes(plan.request.container, plan.specs, pairs)


def _part(plan: Plan, part: AllocatedPart) -> int:
    return sum(step.nbytes for step in plan.part_steps(part.name))


def _device(budget: Budget, logical: LogicalSource, match: Match) -> Measure:
    """Weights, activations and what decoding takes, with the other parts off the device.

    At the model's own picture size, computing in bfloat16, with a GPU's context.
    """
    if match.architecture not in ARCHITECTURES:
        raise UsageError(
            f"{budget.text}: what a picture takes follows from the architecture, and "
            f"{match.architecture} is not known so well: give --max-size or --bpw"
        )
    width, height = native_size(match)
    found = footprint(logical, match, Picture(width, height))
    if denoise_stage(found) is None:
        raise UsageError(
            f"{budget.text}: activations of this {match.architecture} are not known: give "
            "--max-size or --bpw"
        )
    limit = int(budget.value)

    def taken(plan: Plan) -> int:
        return denoising_nbytes(_with(found, plan))

    def notes(plan: Plan) -> tuple[str, ...]:
        whole = _with(found, plan)
        stage = denoise_stage(whole)
        assert stage is not None
        return (
            f"at {width}x{height} the denoiser's step takes {taken(plan) / _GIB:.2f} GiB: weights "
            f"{stage.weights.nbytes / _GIB:.2f}, activations {stage.activations.nbytes / _GIB:.2f},"
            f" one weight decoded {stage.scratch / _GIB:.2f}, the device's own context "
            f"{CONTEXT_NBYTES['cuda'] / _GIB:.2f}; other parts are off the device meanwhile",
            *others_over(whole, limit),
            *whole.notes,
        )

    return Measure(limit, taken, False, notes)


def _with(found: Footprint, plan: Plan) -> Footprint:
    weights = plan_weights(plan.part_steps("denoiser"), compute=found.picture.compute)
    return with_denoiser(found, weights)
