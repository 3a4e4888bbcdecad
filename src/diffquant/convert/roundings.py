"""Which weights of a plan are rounded otherwise than to the nearest, and why the others are not.

`--rounding search` looks for better scales, `feedback` lets later columns make up for errors and
needs what the layer is fed (io/inputs.py). Formats differ in what they allow (quant/rounding/levels
has a row for each that allows anything); each weight's reason says what was done with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.request import Request
from diffquant.convert.step import Step
from diffquant.core.errors import UnsupportedShape, UsageError, shorten
from diffquant.io.inputs import InputsFile, covariance_shape
from diffquant.quant.formats import FORMATS, matrix_shape

__all__ = ["Rounded", "feedback_nbytes", "round_steps", "weighed_by_search"]

_Values = Mapping[str, NDArray[np.float32]]
# Arrays of b * b float64 alive while a block of a covariance is prepared, and what stays of each.
_COPIES, _KEPT = 6, 2 * 4


@dataclass(frozen=True, slots=True)
class Rounded:
    """Steps that know how they are rounded.

    Attributes:
        steps: as given, reasons extended.
        importance: canonical key -> (K,) what errors weigh, for encoders and for scale searches.
        warnings: what could not be done as asked.
        feedback: whether any step needs statistics of inputs while the plan runs.
    """

    steps: tuple[Step, ...]
    importance: _Values
    warnings: tuple[str, ...] = ()
    feedback: bool = False


def weighed_by_search(request: Request) -> frozenset[str]:
    """Formats whose scale search weighs errors by an importance matrix."""
    if request.rounding == "nearest":
        return frozenset()
    from diffquant.quant.rounding.levels import LEVELS

    return frozenset(name for name, row in LEVELS.items() if row.searches)


def feedback_nbytes(columns: int) -> int:
    """Memory that feedback takes for a layer of so many columns, whatever its rows."""
    shape = covariance_shape(columns)
    return _COPIES * 8 * shape[-1] ** 2 + _KEPT * math.prod(shape[:-2]) * shape[-1] ** 2


def round_steps(
    steps: Sequence[Step],
    request: Request,
    inputs: InputsFile | None,
    architecture: str,
    importance: _Values,
) -> Rounded:
    """Give every step the rounding that was asked for, or the reason why it has another.

    Raises:
        UsageError: feedback without statistics of inputs, or with those of another model.
        UnsupportedShape: statistics of other columns than a weight has.
    """
    if request.rounding == "nearest":
        if inputs is not None and not (request.bias_correction or request.lora_rank):
            raise UsageError(
                "--inputs is for --rounding feedback or search, --bias-correction, --error-lora"
            )
        return Rounded(tuple(steps), importance)
    if inputs is None and request.rounding == "feedback":
        raise UsageError(
            "--rounding feedback needs what the layers are fed: --inputs FILE, made by `diffquant "
            "calibrate MODEL --inputs FILE`"
        )
    if inputs is not None:
        _check_model(inputs, architecture)
    weigh = dict(importance)
    done = [_rounded(step, request.rounding, inputs, weigh) for step in steps]
    used = [step for step in done if step.rounding != "nearest"]
    lacking = [s.key for s in used if s.rounding != request.rounding]
    warnings = []
    if not used:
        warnings.append(f"--rounding {request.rounding} changes nothing: no format here allows it")
    if inputs is not None and used and len(lacking) == len(used):
        warnings.append(f"{inputs.path.name}: no layer written here is in it")
    elif lacking:
        warnings.append(
            f"{len(lacking)} weights have no statistics of inputs, only their scales are searched: "
            f"{shorten(lacking, 3)}"
        )
    return Rounded(tuple(done), weigh, tuple(warnings), any(s.rounding == "feedback" for s in used))


def _check_model(inputs: InputsFile, architecture: str) -> None:
    known = inputs.metadata.get("diffquant.architecture", architecture)
    if known != architecture:
        raise UsageError(
            f"{inputs.path.name}: measured on a {known} model, the source is {architecture}"
        )


def _rounded(
    step: Step, asked: str, inputs: InputsFile | None, weigh: dict[str, NDArray[np.float32]]
) -> Step:
    """One step; `weigh` gains what its columns weigh, where only scales are searched."""
    from diffquant.quant.rounding.levels import LEVELS

    name = step.decision.format
    if not name or FORMATS[name].is_cast:
        return step
    row = LEVELS.get(name)
    if row is None:
        return _noted(step, f"rounded to nearest: {name} allows nothing else here")
    columns = matrix_shape(step.assignment.shape)[1]
    known = inputs is not None and step.part in ("denoiser", "") and step.key in inputs.columns
    if known and inputs is not None and inputs.columns[step.key] != columns:
        raise UnsupportedShape(
            f"{inputs.path.name}: {step.key!r} has {inputs.columns[step.key]} columns, the weight "
            f"has {columns}: the statistics are of another model"
        )
    if known and asked == "feedback":
        shape = covariance_shape(columns)
        blocks = f" in {shape[0]} blocks of {shape[1]} columns" if len(shape) == 3 else ""
        return replace(_noted(step, f"rounded by feedback{blocks}"), rounding="feedback")
    if not row.searches:
        why = "no inputs known" if asked == "feedback" else f"{name} has its scales from extremes"
        return _noted(step, f"rounded to nearest: {why}")
    note = "scales searched"
    if asked == "feedback":
        note += ": no inputs known"
    elif FORMATS[name].rotation:
        note += ", errors weigh alike in rotated columns"
    elif known and inputs is not None and step.key not in weigh:
        weigh[step.key] = np.ascontiguousarray(_diagonal(inputs, step.key))
        note += ", weighted by inputs"
    return replace(_noted(step, note), rounding="search")


def _diagonal(inputs: InputsFile, key: str) -> NDArray[np.float32]:
    return np.diagonal(inputs.covariance(key), axis1=-2, axis2=-1).reshape(-1)


def _noted(step: Step, note: str) -> Step:
    decision = replace(step.decision, reason=f"{step.decision.reason}; {note}")
    return replace(step, decision=decision)
