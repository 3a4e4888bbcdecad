"""allocate_bits(): a format for every weight of one part, under a budget.

options (allocation_options.py) x errors (allocation_errors.py) -> quant/allocate.py -> a recipe,
which the usual plan follows. What a plan takes of the budget is measured on the plan itself, header
and padding included, and the choice is corrected until it takes no more (allocation_plan.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from diffquant.convert.allocation_choice import Choice
from diffquant.convert.allocation_errors import items_of, sensitivity_for
from diffquant.convert.allocation_options import among_from, tensor_options
from diffquant.convert.allocation_part import allocated_part
from diffquant.convert.allocation_plan import AllocationPlanner, chosen_formats
from diffquant.convert.allocation_report import AllocationReport
from diffquant.convert.allocation_view import (
    curve_of,
    format_shares,
    freed_tensors,
    named_plans,
    named_rows,
    tensor_choices,
)
from diffquant.convert.budgets import Budget, Counts, measure_for
from diffquant.convert.jobs import opened
from diffquant.convert.output import fingerprint
from diffquant.convert.plan import Plan
from diffquant.convert.request import Request
from diffquant.core.errors import UsageError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.io.importance import ImportanceMatrix
from diffquant.io.inputs import InputsFile
from diffquant.quant.allocate import Item
from diffquant.quant.types import QuantType

__all__ = ["Allocated", "allocate_bits"]

_USUALLY_LEFT = 0.01
_WHAT: Mapping[Counts, str] = {
    "file": "the file",
    "denoiser": "{part}",
    "device": "the denoiser's step on a device",
}


@dataclass(frozen=True, slots=True)
class Allocated:
    """A choice.

    Attributes:
        request: what to run: the one given, with a recipe and a type named after its bits.
        label: the plainest type of the format that most weights have; names files and recipes.
        report: what was chosen, and why.
        choice: the same as data that can be kept.
    """

    request: Request
    label: QuantType
    report: AllocationReport
    choice: Choice


def allocate_bits(
    src: Path,
    request: Request,
    budget: Budget,
    *,
    sensitivity: Path | None = None,
    matrix: ImportanceMatrix | None = None,
    inputs: InputsFile | None = None,
    base: Path | None = None,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Allocated:
    """Choose a format for every weight of the denoiser, or of a text encoder on its own.

    Args:
        src: any source.
        request: what to write, without type and recipe; rules, target and changes hold.
        budget: what may be taken, and what to choose from.
        sensitivity: a file of predicted errors; looked for where None, else made of the weights.
        matrix: importance matrix.
        inputs: statistics of layer inputs, as for run_job.
        base: folder that run_job will be given; a text encoder's header is filled from it.
        workers: threads.
        progress: told about tensors, where weights are measured.

    Raises:
        UsageError: a budget below the smallest choice (with the range), formats or parts that do
            not fit it, or nothing to choose.
        DiffquantError: as run_job, of what can be known beforehand.
    """
    _check(request, budget)
    sources = opened(
        src, arch=request.arch, parts=request.added, ema=request.use_ema, quantized=True
    )
    with sources as (source, logical, match):
        part = allocated_part(match, request, budget.text)
        among = among_from(budget.among, request.container, request.target, part.targets)
        choices = tensor_options(logical, part, request, among, free_kept=budget.free_kept)
        if not choices.steps:
            raise UsageError(
                f"{budget.text}: no weight of this {match.architecture} is left to choose for: "
                f"rules and shapes decide all of them"
            )
        if budget.free_kept and not choices.kept:
            raise UsageError(
                f"--free-kept: of no layer that types keep of this {match.architecture} is it "
                "known that every program reads it packed; free what yours reads with --tensor-type"
            )
        source_id = fingerprint(source)
        named = replace(request, allocated=_header(budget, among.names))
        measure = measure_for(budget, source, logical, match, part, base=base)
        planner = AllocationPlanner(
            logical, match, part, named, among, choices.steps, choices.kept, measure, matrix, inputs
        )
        plans, refused = named_plans(planner)
        known = sensitivity_for(
            planner,
            _wanted(planner, plans),
            src=src,
            source=source_id,
            named=sensitivity,
            workers=workers,
            progress=progress,
        )
        origin = f"{known.sensitivity.method} of {known.sensitivity.source[:16] or 'unknown'}"
        named = replace(named, allocated=f"{named.allocated}; sensitivity: {origin}")
        planner = replace(planner, request=named)
        items, lacking = items_of(planner, known.sensitivity)
        smallest, fixed, largest = _range(planner, items)
        if measure.limit < smallest:
            raise UsageError(_below(budget, (smallest, largest), planner))
        found = planner.solve(items, measure.limit, fixed)
        formats = chosen_formats(items, found.choice.chosen)
        taken = found.nbytes - found.choice.nbytes
        notes = [*known.notes, *lacking, *refused, *measure.notes(found.plan)]
        notes[:0] = _left_over(budget, measure.limit, found.nbytes, largest)
        report = AllocationReport(
            asked=budget.text,
            part=part.name,
            counts=budget.counts,
            limit_nbytes=measure.limit,
            nbytes=found.nbytes,
            smallest_nbytes=smallest,
            largest_nbytes=largest,
            bits_per_weight=found.plan.bits_per_weight(part.name),
            among=among.names,
            sensitivity=known.told,
            method=known.sensitivity.method,
            unit=known.sensitivity.unit,
            error=found.choice.error,
            bound=found.choice.bound,
            exact=found.choice.exact,
            slope=found.choice.slope,
            formats=format_shares(planner, formats),
            tensors=tensor_choices(items, found.choice.chosen),
            curve=curve_of(items, taken),
            published=named_rows(planner, plans, known.sensitivity, items),
            freed=freed_tensors(planner, formats),
            notes=tuple(notes),
        )
        asked = found.plan.request
        assert asked.type is not None
        choice = replace(
            planner.choice(formats),
            type=asked.type.name,
            notes=(f"errors from {known.told}", *notes),
        )
        return Allocated(asked, planner.label(formats), report, choice)


def _check(request: Request, budget: Budget) -> None:
    if request.container == "folder":
        raise UsageError(
            f"{budget.text}: bits are allocated in single files: write a .gguf or .safetensors file"
        )
    if request.all_parts or len(request.parts) > 1:
        raise UsageError(
            f"{budget.text}: bits are allocated to one part, the denoiser or the one that --part "
            "names: leave out --all, and write parts one by one"
        )
    if budget.free_kept and request.container != "gguf":
        raise UsageError(
            "--free-kept is for .gguf files: which layers that types keep are read packed from "
            f"{request.container} is not known here; name them with --tensor-type"
        )
    if budget.value <= 0:
        raise UsageError(f"{budget.text}: expected more than nothing")


def _header(budget: Budget, among: tuple[str, ...]) -> str:
    freed = "; with --free-kept" if budget.free_kept else ""
    return f"{budget.text}{freed}; among: {', '.join(among)}"


def _left_over(budget: Budget, limit: int, nbytes: int, largest: int) -> list[str]:
    """Why a budget is not spent."""
    if limit > largest:
        return [f"{budget.text} is more than the largest choice takes: all is finest"]
    left = 1 - nbytes / limit
    if left <= _USUALLY_LEFT:
        return []
    return [
        f"{left:.1%} is left over: no choice that takes more bytes was found to have less error"
    ]


def _wanted(planner: AllocationPlanner, plans: Mapping[str, Plan]) -> dict[str, set[str]]:
    """Formats that errors are wanted of: options, and what named types store."""
    wanted = {key: set(steps) for key, steps in planner.options.items()}
    for plan in plans.values():
        for step in plan.part_steps(planner.part.name):
            if step.key in wanted and step.decision.format:
                wanted[step.key].add(step.stored)
    return wanted


def _range(planner: AllocationPlanner, items: tuple[Item, ...]) -> tuple[int, int, int]:
    """What the smallest choice takes, beside its items too, and what the largest takes."""
    low = {item.key: min(item.options, key=lambda one: (one.nbytes, one.error)) for item in items}
    high = {item.key: min(item.options, key=lambda one: (one.error, one.nbytes)) for item in items}
    taken = [
        planner.measure.of(planner.plan({key: one.format for key, one in choice.items()}))
        for choice in (low, high)
    ]
    return taken[0], taken[0] - sum(one.nbytes for one in low.values()), taken[1]


def _below(budget: Budget, ends: tuple[int, int], planner: AllocationPlanner) -> str:
    smallest, largest = ends
    what = _WHAT[budget.counts].format(part=planner.part.told)
    if budget.counts == "denoiser":
        per_bit = planner.measure.per_bit
        low, high = smallest / per_bit, largest / per_bit
        told = f"{low:.3f} to {high:.3f} bits per weight"
    else:
        told = f"{smallest:,} to {largest:,} bytes"
    return (
        f"{budget.text} cannot be met: among {', '.join(planner.among.names)} {what} takes {told} "
        f"(for {planner.among.target.name}); ask for more, or allow smaller formats with --among"
    )
