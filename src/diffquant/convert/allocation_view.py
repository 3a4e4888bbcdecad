"""What is shown of an allocation: neighbours of each choice, the curve, named types beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffquant.convert.allocation_errors import option_error
from diffquant.convert.allocation_plan import AllocationPlanner, kept_because
from diffquant.convert.allocation_report import (
    CurvePoint,
    FreedTensor,
    PublishedType,
    TensorChoice,
)
from diffquant.convert.plan import Plan, make_plan
from diffquant.convert.sensitivity import Sensitivity
from diffquant.core.errors import PolicyError, QuantError
from diffquant.quant.allocate import Item, allocate, extremes
from diffquant.quant.types import TYPES

__all__ = [
    "curve_of",
    "format_shares",
    "freed_tensors",
    "named_plans",
    "named_rows",
    "tensor_choices",
]

_POINTS = 9
_GGUF_TYPES = (
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip


def tensor_choices(items: Sequence[Item], chosen: Sequence[int]) -> tuple[TensorChoice, ...]:
    """Each tensor's format, and what one step down or up would have changed."""
    return tuple(_choice(item, at) for item, at in zip(items, chosen, strict=True))


def _choice(item: Item, at: int) -> TensorChoice:
    now = item.options[at]
    row = TensorChoice(item.key, now.format, now.nbytes, now.error)
    smaller = [one for one in item.options if one.nbytes < now.nbytes]
    larger = [one for one in item.options if one.nbytes > now.nbytes and one.error < now.error]
    if smaller:
        down = max(smaller, key=lambda one: (one.nbytes, -one.error))
        row = replace(
            row,
            smaller=down.format,
            smaller_saves=now.nbytes - down.nbytes,
            smaller_costs=down.error - now.error,
        )
    if larger:
        up = min(larger, key=lambda one: (one.nbytes, one.error))
        row = replace(
            row,
            larger=up.format,
            larger_costs=up.nbytes - now.nbytes,
            larger_brings=now.error - up.error,
        )
    return row


def format_shares(planner: AllocationPlanner, formats: Mapping[str, str]) -> dict[str, float]:
    """Format -> share of the allocated weights, the largest first."""
    weights: dict[str, int] = {}
    for key, name in formats.items():
        weights[name] = weights.get(name, 0) + planner.options[key][name].parameters
    total = sum(weights.values())
    ordered = sorted(weights.items(), key=lambda row: -row[1])
    return {name: count / total for name, count in ordered}


def freed_tensors(
    planner: AllocationPlanner, formats: Mapping[str, str]
) -> tuple[FreedTensor, ...]:
    """Layers that types keep and that were chosen for."""
    return tuple(
        FreedTensor(
            key,
            formats[key],
            step.stored,
            kept_because(step),
            planner.step_nbytes(step) - planner.nbytes(key, formats[key]),
        )
        for key, step in planner.kept.items()
    )


def curve_of(items: Sequence[Item], fixed: int) -> tuple[CurvePoint, ...]:
    """Least error at evenly spaced sizes, from the smallest choice to the largest."""
    least, most = extremes(items)
    sizes = [least + (most - least) * at // (_POINTS - 1) for at in range(_POINTS)]
    return tuple(
        CurvePoint(size + fixed, allocate(items, size).error) for size in dict.fromkeys(sizes)
    )


def named_plans(planner: AllocationPlanner) -> tuple[dict[str, Plan], tuple[str, ...]]:
    """Plans of the named types that compare with the mix, and why others do not."""
    container = planner.request.container
    names: Sequence[str] = _GGUF_TYPES
    if container != "gguf":
        based = [kind for kind in TYPES.values() if kind.base in planner.among.packed]
        names = [kind.name for kind in based if container in kind.dialects]
    asked = replace(planner.request, target=planner.among.target.name, recipe=None, allocated="")
    plans, refused = {}, []
    for name in names:
        request = replace(asked, type=TYPES[name])
        try:
            plans[name] = make_plan(
                planner.logical, planner.match, request,
                matrix=planner.matrix, inputs=planner.inputs,
            )  # fmt: skip
        except (PolicyError, QuantError) as error:
            refused.append(f"{name} is not compared: {error}")
    return plans, tuple(refused)


def named_rows(
    planner: AllocationPlanner,
    plans: Mapping[str, Plan],
    sensitivity: Sensitivity,
    items: Sequence[Item],
) -> tuple[PublishedType, ...]:
    """Size and predicted error of each named type, and of the best mix of as many tensor bytes."""
    least = extremes(items)[0]
    rows = []
    for name, plan in plans.items():
        steps = {step.key: step for step in plan.part_steps(planner.part.name)}
        errors = [option_error(planner, sensitivity, steps[key]) for key in planner.options]
        known = [one for one in errors if one is not None]
        room = sum(planner.step_nbytes(steps[key]) for key in planner.options)
        rows.append(
            PublishedType(
                type=name,
                nbytes=planner.measure.of(plan),
                error=math.fsum(known) if len(known) == len(errors) else None,
                allocated=allocate(items, room).error if room >= least else None,
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.nbytes))
