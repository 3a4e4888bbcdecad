"""Which importance values belong to which weight of a plan, and what a missing one means.

Names are matched to canonical keys: as they are, with the prefixes that single files put before a
part, and as the source itself names its tensors. Weights that were fused share their input, so the
values of any piece serve the whole.

A matrix is of no use to most formats; a plan says per tensor whether it was used. What llama.cpp
does with a tensor it lacks is kept: formats that can do without are encoded without, others are
refused before anything is written (ggml-org/llama.cpp@42ea59b:src/llama-quant.cpp, "Missing
importance matrix for tensor").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.architectures.base import Architecture
from diffquant.convert.detect import PartMatch, to_canonical
from diffquant.convert.step import Step
from diffquant.core.errors import ImportanceRequired, UnsupportedShape, UsageError, shorten
from diffquant.io.importance import ImportanceMatrix
from diffquant.io.inputs import InputsFile
from diffquant.quant.formats import format_named, matrix_shape

__all__ = ["Weighed", "check_columns", "importance_values", "match_entries", "weigh_steps"]

Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Weighed:
    """Steps that know about importance.

    Attributes:
        steps: as given, reasons extended.
        values: canonical key -> (K,) mean squares, of the steps that are encoded with them.
        warnings: entries and tensors that found no counterpart.
    """

    steps: tuple[Step, ...]
    values: Mapping[str, Values]
    warnings: tuple[str, ...] = ()


def weigh_steps(
    steps: Sequence[Step],
    matrix: ImportanceMatrix | None,
    architecture: Architecture,
    parts: Sequence[PartMatch],
    searched: frozenset[str] = frozenset(),
    *,
    elsewhere: bool = False,
) -> Weighed:
    """Give every step whose format weighs errors its importance, and say so in its reason.

    `searched` are formats whose encoder has one mode, but whose scales are searched for.
    `elsewhere` says that the matrix weighs something besides the formats.

    Raises:
        ImportanceRequired: a format that cannot do without has none; names the tensors.
        UnsupportedShape: values of another length than the weight's rows.
        UsageError: no entry of the matrix belongs to this model.
    """
    names = match_entries(matrix, architecture, parts) if matrix is not None else {}
    found: list[Step] = []
    values: dict[str, Values] = {}
    lacking: list[str] = []
    refused: dict[str, list[str]] = {}
    for step in steps:
        kind = format_named(step.decision.format).importance if step.decision.format else "unused"
        if step.decision.format in searched:
            kind = "optional"
        name = names.get((step.part, step.key))
        note = ""
        if kind == "optional" and matrix is not None and step.flat:
            note = f"; no importance: rows of {step.flat[1]} cut across its columns"
        elif kind != "unused" and matrix is not None and name is not None:
            values[step.key] = importance_values(matrix, name, step)
            note = "; with importance"
        elif kind == "required":
            refused.setdefault(step.decision.format, []).append(step.key)
        elif kind == "optional" and matrix is not None:
            lacking.append(step.key)
            note = "; no importance for it in the matrix"
        decision = replace(step.decision, reason=step.decision.reason + note)
        found.append(replace(step, decision=decision))
    _refuse(refused, matrix)
    warnings = _warnings(matrix, names, lacking) if matrix is not None else ()
    if matrix is not None and not values and not elsewhere:
        warnings += ("the importance matrix changes nothing: no format here weighs errors by it",)
    return Weighed(tuple(found), values, warnings)


def match_entries(
    matrix: ImportanceMatrix, architecture: Architecture, parts: Sequence[PartMatch]
) -> dict[tuple[str, str], str]:
    """(part, canonical key) -> name of the entry that speaks of it.

    Raises:
        UsageError: no entry does.
    """
    names: dict[tuple[str, str], str] = {}
    for part in parts:
        prefixes = architecture.component(part.name, part.kind).prefixes
        if part.name == "denoiser" or len(parts) == 1:
            prefixes = ("", architecture.gguf_prefix, *prefixes)
        for assignment in to_canonical(part):
            pieces = [piece.key for piece in assignment.pieces]
            local = [key.removeprefix(part.prefix) for key in pieces]
            spelled = [prefix + assignment.target for prefix in prefixes] + pieces + local
            name = next((one for one in spelled if one in matrix.entries), None)
            if name is not None:
                names[part.name, assignment.target] = name
    if parts and not names:
        known = next(iter(matrix.entries))
        raise UsageError(
            f"{shorten(matrix.files)}: no entry belongs to this {architecture.slug} model (its "
            f"first is {known!r}): it is of another model"
        )
    return names


def importance_values(matrix: ImportanceMatrix, name: str, step: Step) -> Values:
    """Values of an entry, one per column of the weight.

    Raises:
        UnsupportedShape: of another length.
    """
    values = matrix.entries[name].values()
    columns = matrix_shape(step.assignment.shape)[1]
    if values.size != columns:
        raise UnsupportedShape(
            f"{shorten(matrix.files)}: {name!r} has {values.size} values, the weight has {columns} "
            "columns: the importance matrix is of another model"
        )
    return values


def check_columns(inputs: InputsFile, key: str, columns: int) -> None:
    """Check that statistics of a layer's inputs are of this layer.

    Raises:
        UnsupportedShape: they have another number of columns.
    """
    if inputs.columns[key] != columns:
        raise UnsupportedShape(
            f"{inputs.path.name}: {key!r} has {inputs.columns[key]} columns, the weight has "
            f"{columns}: the statistics are of another model"
        )


def _refuse(refused: Mapping[str, Sequence[str]], matrix: ImportanceMatrix | None) -> None:
    if not refused:
        return
    listed = "; ".join(f"{name}: {shorten(keys, 3)}" for name, keys in refused.items())
    if matrix is None:
        raise ImportanceRequired(
            f"cannot be encoded without an importance matrix ({listed}): give one with --imatrix "
            "FILE, made by `diffquant calibrate`"
        )
    first = next(iter(refused.values()))[0]
    raise ImportanceRequired(
        f"{shorten(matrix.files)} has no entry for tensors whose format needs one ({listed}): "
        f"calibrate again, or name another format, such as --tensor-type '{first}=q4_k'"
    )


def _warnings(
    matrix: ImportanceMatrix,
    names: Mapping[tuple[str, str], str],
    lacking: Sequence[str],
) -> tuple[str, ...]:
    warnings = []
    used = set(names.values())
    strange = [name for name in matrix.entries if name not in used]
    if strange:
        warnings.append(
            f"{shorten(matrix.files)}: {len(strange)} of {len(matrix.entries)} entries belong to "
            f"no tensor written here: {shorten(strange, 3)}"
        )
    if lacking:
        warnings.append(
            f"{shorten(matrix.files)}: nothing on {len(lacking)} tensors, encoded without "
            f"importance: {shorten(lacking, 3)}"
        )
    return tuple(warnings)
