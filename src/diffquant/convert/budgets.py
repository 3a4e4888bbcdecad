"""Budgets that bits are allocated under: bytes of the file, bits per weight, memory of a device.

Each says what a plan takes of it, to the byte; the allocation is corrected until the plan that will
run takes no more than was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
from diffquant.core.errors import UsageError
from diffquant.core.tensors import TensorSource
from diffquant.io import file_nbytes

__all__ = ["Budget", "Counts", "Measure", "measure_for"]

Counts = Literal["file", "denoiser", "device"]
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked for.

    Attributes:
        counts: "file": bytes of the whole file; "denoiser": bits per weight of the denoiser;
            "device": bytes of a device while the denoiser runs.
        value: bytes, or bits per weight.
        text: the option as typed.
        among: formats or types to choose from, empty for the usual ones.
    """

    counts: Counts
    value: float
    text: str
    among: tuple[str, ...] = ()


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
    budget: Budget, source: TensorSource, logical: LogicalSource, match: Match
) -> Measure:
    """The measure of a budget on one source.

    Raises:
        UsageError: what the budget counts cannot be told of this source.
    """
    if budget.counts == "file":
        return Measure(int(budget.value), lambda plan: _file(plan, match, source), True, _nothing)
    if budget.counts == "denoiser":
        sizes = next(one for one in match.parts if one.name == "denoiser").shapes.values()
        weights = sum(_size(shape) for shape in sizes)
        return Measure(int(budget.value * weights / 8), _denoiser, False, _nothing, weights / 8)
    return _device(budget, logical, match)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _nothing(_plan: Plan) -> tuple[str, ...]:
    return ()


def _file(plan: Plan, match: Match, source: TensorSource) -> int:
    header = surroundings(plan, match, source, None).header
    pairs = metadata_of(plan, match, source, header)
    return file_nbytes(plan.request.container, plan.specs, pairs)


def _denoiser(plan: Plan) -> int:
    return sum(step.nbytes for step in plan.part_steps("denoiser"))


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
