"""Predicted errors of an allocation's options: which sensitivity they come from, and what it lacks.

A file that was named comes first, then one that lies beside the model or in the user's cache and
was measured on this checkpoint; else the weights themselves are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.allocation_plan import AllocationPlanner
from diffquant.convert.importance import importance_values, match_entries
from diffquant.convert.losses import keeps_numbers
from diffquant.convert.sensitivity import Sensitivity, find_sensitivity, read_sensitivity
from diffquant.convert.sensitivity_weights import Wanted, from_weights
from diffquant.convert.step import Step
from diffquant.core.errors import UsageError, shorten
from diffquant.core.progress import Progress
from diffquant.quant.allocate import Item, Option
from diffquant.quant.formats import FORMATS

__all__ = ["Known", "items_of", "option_error", "sensitivity_for"]


@dataclass(frozen=True, slots=True)
class Known:
    """A sensitivity, where it is from in words, and what should be said of it."""

    sensitivity: Sensitivity
    told: str
    notes: tuple[str, ...] = ()


def sensitivity_for(
    planner: AllocationPlanner,
    wanted: Mapping[str, set[str]],
    *,
    src: Path,
    source: str,
    named: Path | None,
    workers: int | None,
    progress: Progress,
) -> Known:
    """Find the sensitivity of a source, or make one of its weights.

    Args:
        planner: whose options are priced.
        wanted: canonical key -> formats, of options and of types that are compared.
        src: the source, as the user named it.
        source: its fingerprint.
        named: a file that the user named.
        workers: threads.
        progress: told about tensors that are measured.

    Raises:
        UsageError: the named file is of another architecture, or knows none of the tensors.
        MalformedFile, OSError: it cannot be read.
    """
    if named is not None and planner.part.name != "denoiser":
        raise UsageError(
            f"{named.name}: sensitivities are measured of denoisers; errors of "
            f"{planner.part.name} come from its weights (--imatrix): leave out --sensitivity"
        )
    changed = any(planner.request.changes.values())
    merged = ("errors were measured before what is merged here",) if changed else ()
    if named is not None:
        found = read_sensitivity(named)
        _check_named(found, named, planner)
        notes = []
        if found.source != source:
            what = "was measured on another checkpoint" if found.source else "names no checkpoint"
            notes.append(f"{named.name} {what}: its errors are taken for those of this one")
        return Known(found, f"{named.name} ({found.method})", (*notes, *merged))
    cached = find_sensitivity(src, source) if planner.part.name == "denoiser" else ""
    passed = ""
    if not isinstance(cached, str) and (passed := _unpriced(cached[1], planner)):
        cached = f"{cached[0].name} is not used: it knows no error of {passed}"
    if not isinstance(cached, str):
        path, found = cached
        told = f"{path.name} ({found.method}), found by the source's fingerprint"
        return Known(found, told, merged)
    made = _made(planner, wanted, source, workers, progress)
    notes = [cached] if cached else []
    if planner.part.name != "denoiser":
        notes.append(
            "what an encoder's rounding does to pictures is not measured: against a named type of "
            "the size this is no safe gain (docs/allocate.md)"
        )
    if planner.request.rounding != "nearest":
        notes.append(f"errors are those of rounding to nearest, not of {planner.request.rounding}")
    told = "weights and importance" if "importance" in made.context else "weights alone"
    return Known(made, f"{told} ({made.context['sample']})", tuple(notes))


def _unpriced(found: Sensitivity, planner: AllocationPlanner) -> str:
    """The packed formats that are offered, where a file prices none of them: "" where it does."""
    offered = {name for steps in planner.options.values() for name in steps}
    packed = [name for name in FORMATS if name in offered and not FORMATS[name].is_cast]
    known = {name for formats in found.errors.values() for name in formats}
    return "" if known.intersection(packed) else ", ".join(packed)


def _check_named(found: Sensitivity, path: Path, planner: AllocationPlanner) -> None:
    if found.architecture != planner.match.architecture:
        raise UsageError(
            f"{path} is of {found.architecture}, the source is {planner.match.architecture}"
        )
    if not found.errors.keys() & planner.options.keys():
        raise UsageError(f"{path} knows none of the tensors: it is of another model")


def _made(
    planner: AllocationPlanner,
    wanted: Mapping[str, set[str]],
    source: str,
    workers: int | None,
    progress: Progress,
) -> Sensitivity:
    steps = {key: next(iter(found.values())) for key, found in planner.options.items()}
    importance = _importance(planner, steps)
    order = {name: place for place, name in enumerate(FORMATS)}
    return from_weights(
        planner.logical,
        [
            Wanted(step, tuple(sorted(wanted[key], key=lambda name: order[name])))
            for key, step in steps.items()
        ],
        architecture=planner.match.architecture,
        source=source,
        importance=importance,
        matrix=shorten(planner.matrix.files) if planner.matrix is not None else "",
        workers=workers,
        progress=progress,
    )


def _importance(
    planner: AllocationPlanner, steps: Mapping[str, Step]
) -> dict[str, NDArray[np.float32]]:
    if planner.matrix is None:
        return {}
    part = planner.part
    names = match_entries(planner.matrix, part.architecture, [part.match])
    return {
        key: importance_values(planner.matrix, names[part.name, key], step)
        for key, step in steps.items()
        if (part.name, key) in names
    }


def option_error(planner: AllocationPlanner, sensitivity: Sensitivity, step: Step) -> float | None:
    """Predicted error of a weight as a step stores it; 0 if numbers are kept, None if unknown."""
    if keeps_numbers(planner.logical, step):
        return 0.0
    return sensitivity.errors.get(step.key, {}).get(step.stored)


def kept_as(planner: AllocationPlanner, key: str) -> str:
    """The format that types keep a freed layer in; "" for any other tensor."""
    return planner.kept[key].stored if key in planner.kept else ""


def items_of(
    planner: AllocationPlanner, sensitivity: Sensitivity
) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """Options with their prices; what was not measured is held at its finest, and said."""
    items, held, lacking = [], [], dict[str, int]()
    for key, steps in planner.options.items():
        priced = []
        for name, step in steps.items():
            error = option_error(planner, sensitivity, step)
            if error is None and name == kept_as(planner, key):
                error = 0.0  # as types have it: whoever frees a layer may still leave it alone
            if error is None:
                lacking[name] = lacking.get(name, 0) + 1
            else:
                priced.append(Option(name, planner.nbytes(key, name), error))
        if not priced or (key not in sensitivity.errors and len(steps) > 1):
            finest = kept_as(planner, key) or max(steps, key=lambda name: planner.nbytes(key, name))
            priced = [Option(finest, planner.nbytes(key, finest), 0.0)]
            held.append(key)
        items.append(Item(key, tuple(priced)))
    unused = [key for key in sensitivity.errors if key not in planner.options]
    return tuple(items), tuple(_told(held, lacking, unused))


def _told(held: Sequence[str], lacking: Mapping[str, int], unused: Sequence[str]) -> list[str]:
    notes = []
    if unused:
        notes.append(
            f"{len(unused)} measured tensors are not chosen for, rules or shapes decide them: "
            f"{shorten(unused, 3)}"
        )
    if held:
        notes.append(
            f"{len(held)} tensors were not measured and stay at their finest: {shorten(held, 3)}"
        )
    if lacking:
        listed = ", ".join(f"{name} of {count}" for name, count in lacking.items())
        notes.append(f"not offered, since no error is known: {listed} tensors")
    return notes
