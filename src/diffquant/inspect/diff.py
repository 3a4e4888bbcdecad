"""diff(): two checkpoints, tensor by tensor, in classes from "the same bytes" to "another weight".

Tensors are matched by name. Where both files are recognised as one architecture and name things
differently (Diffusers and single-file names, another prefix), canonical names match them, so that a
GGUF file can be held against the folder it was made from.

The classes, best first (`DIFF_CLASSES`); *error* is relative RMSE, A being the reference:

- identical: same storage and same bytes, scales included;
- values: other bytes, and every decoded number is equal;
- scale: one format, whose scales were searched by another rule (ggml's without and with importance,
  stable-diffusion.cpp's): the numbers differ by no more than rounding explains;
- format: two formats, and again no more than rounding explains;
- different, shape, missing_in_a, missing_in_b, unreadable: real differences. Unreadable is a weight
  packed in a way that cannot be decoded here, whose bytes differ.

"What rounding explains" can be measured. With a reference, the source that both files were made
from: each side is within the tensor gate of quant/metrics.py, 1.5 times its format's error on
Gaussian weights. Without: independent errors add in squares, so A and B are at most 1.5 *
sqrt(a^2 + b^2) apart. A fine-tune that moves a weight by less than its format's error cannot be
told from another rule that way; with the reference it can where it leaves the gate.

Bytes are compared first, in pieces of 4 MiB; only what differs is decoded, about a million weights
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffquant.convert.binding import bind
from diffquant.convert.canonical_rows import canonical_rows
from diffquant.convert.logical import LogicalSource
from diffquant.core.errors import UsageError, shorten
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.inspect.matching import Entry, Side, entries, needs_canonical, recognise
from diffquant.io import open_source
from diffquant.quant.formats import FORMATS, matrix_shape
from diffquant.quant.metrics import ErrorStats, verdict_of

__all__ = ["DIFF_CLASSES", "DiffClass", "DiffReport", "TensorDiff", "diff"]

_CHUNK = 1 << 20  # weights decoded at once
_CHUNK_NBYTES = 1 << 22  # bytes compared at once
_GATE = 1.5  # quant/metrics.py: what passes, in multiples of the format's error
_EXACT = 1e-6


@dataclass(frozen=True, slots=True)
class DiffClass:
    """One class; `accepted` classes are no real difference unless the caller is stricter."""

    name: str
    accepted: bool
    about: str


DIFF_CLASSES: dict[str, DiffClass] = {
    row.name: row
    for row in (
        DiffClass("identical", True, "same bytes"),
        DiffClass("values", True, "other bytes, equal values"),
        DiffClass("scale", True, "scale rule differs"),
        DiffClass("format", True, "format differs"),
        DiffClass("different", False, "really different"),
        DiffClass("shape", False, "shape differs"),
        DiffClass("missing_in_a", False, "missing in A"),
        DiffClass("missing_in_b", False, "missing in B"),
        DiffClass("unreadable", False, "bytes differ, cannot be decoded"),
    )
}


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor of both files.

    Attributes:
        key: name in A, or "part/canonical key".
        kind: DIFF_CLASSES name.
        a, b: what it is stored as, "" where it is missing.
        shape_a, shape_b: logical shapes.
        parameters: number of weights (of A, where A has it).
        error: relative RMSE of B against A; None where nothing was decoded.
        error_a, error_b: relative RMSE of each against the reference, where there is one.
        note: what the class alone does not say.
    """

    key: str
    kind: str
    a: str
    b: str
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    parameters: int
    error: float | None = None
    error_a: float | None = None
    error_b: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class DiffReport:
    """Two files compared; `matched_by` is "name" or "canonical name"; `tensors` worst first."""

    a: str
    b: str
    ref: str
    matched_by: str
    same: bool
    allow: str
    classes: Mapping[str, int]
    tensors: tuple[TensorDiff, ...]
    warnings: tuple[str, ...] = ()


def diff(
    a: Path,
    b: Path,
    *,
    ref: Path | None = None,
    parts: tuple[str, ...] = (),
    allow: str = "format",
    progress: Progress = NO_PROGRESS,
) -> DiffReport:
    """Compare two checkpoints.

    Args:
        a: the reference of every error, unless there is `ref`.
        b: the other file.
        ref: the source both were made from; gives each file's own error, and decides classes.
        parts: compare these parts only; both files must be recognised.
        allow: the last accepted class, "identical", "values", "scale" or "format".
        progress: told about compared weights.

    Raises:
        UsageError: `allow` is not one of the accepted classes, or a part is in neither file.
        CheckpointError: a file cannot be read.
    """
    accepted = [row.name for row in DIFF_CLASSES.values() if row.accepted]
    if allow not in accepted:
        raise UsageError(f"allow {allow!r}: expected one of {', '.join(accepted)}")
    with ExitStack() as stack:
        sides = []
        for path in (a, b, *((ref,) if ref is not None else ())):
            source = stack.enter_context(open_source(path))
            logical = bind(source)
            sides.append(Side(path, logical, recognise(logical)))
        canonical, warnings = needs_canonical(sides)
        tables = [entries(side, canonical=canonical, parts=parts) for side in sides]
        if parts and not any(tables[:2]):
            raise UsageError(f"no part {shorten(parts)} in {a} or {b}")
        warnings += _companions(sides)
        rows = _compare_all(tables, progress)
    ranks = list(DIFF_CLASSES)
    rows.sort(key=lambda row: (-ranks.index(row.kind), -_badness(row), row.key))
    limit = ranks.index(allow)
    return DiffReport(
        a=str(a),
        b=str(b),
        ref=str(ref) if ref is not None else "",
        matched_by="canonical name" if canonical else "name",
        same=all(ranks.index(row.kind) <= limit for row in rows),
        allow=allow,
        classes={name: sum(row.kind == name for row in rows) for name in ranks},
        tensors=tuple(rows),
        warnings=tuple(warnings),
    )


def _badness(row: TensorDiff) -> float:
    error = max(row.error or 0.0, row.error_a or 0.0, row.error_b or 0.0)
    return error if not math.isnan(error) else math.inf


def _companions(sides: list[Side]) -> list[str]:
    """Input scales and the like decide no decoded weight; that they differ is said."""
    odd = (".input_scale", ".scale_input")
    sets = [{k for k in side.logical.consumed if k.endswith(odd)} for side in sides[:2]]
    different = sets[0] ^ sets[1]
    if not different:
        return []
    return [f"{len(different)} scales of layer inputs are in one file only: not compared"]


def _compare_all(tables: list[dict[str, Entry]], progress: Progress) -> list[TensorDiff]:
    a, b = tables[:2]
    names = dict.fromkeys((*a, *b))
    progress.start("compare", sum(math.prod(one.assignment.shape) for one in a.values()), "w")
    rows = []
    for key in names:
        one = a.get(key)
        other = b.get(key)
        if one is not None and other is not None:
            ref = tables[2].get(key) if len(tables) > 2 else None
            rows.append(_compare(key, one, other, ref, len(tables) > 2))
        elif one is not None:
            shape, size = one.assignment.shape, math.prod(one.assignment.shape)
            rows.append(TensorDiff(key, "missing_in_b", one.stored, "", shape, (), size))
        elif other is not None:
            shape, size = other.assignment.shape, math.prod(other.assignment.shape)
            rows.append(TensorDiff(key, "missing_in_a", "", other.stored, (), shape, size))
        progress.advance(math.prod(one.assignment.shape) if one is not None else 0, key)
    progress.stop()
    return rows


def _compare(key: str, a: Entry, b: Entry, ref: Entry | None, wanted: bool) -> TensorDiff:
    shape_a, shape_b = a.assignment.shape, b.assignment.shape

    def row(kind: str, errors: _Errors | None = None, note: str = "") -> TensorDiff:
        found = errors or _Errors()
        size = math.prod(shape_a)
        return TensorDiff(
            key, kind, a.stored, b.stored, shape_a, shape_b, size, found.ab, found.a, found.b, note
        )

    # Canonical names go with canonical shapes, but some 1x1 convolutions are linear elsewhere.
    moved = a.assignment.target != a.tensors[0].key if a.tensors else False
    if (matrix_shape(shape_a) != matrix_shape(shape_b)) if moved else (shape_a != shape_b):
        return row("shape")
    identical = _same_bytes(a, b)
    note = ""
    if ref is not None and matrix_shape(ref.assignment.shape) != matrix_shape(shape_a):
        note, ref = f"the reference has shape {ref.assignment.shape}", None
    elif ref is None and wanted:
        note = "not in the reference"
    if not all(one.is_float for one in (*a.tensors, *b.tensors)):
        packed = next((one.why for one in (*a.tensors, *b.tensors) if one.why), "")
        if identical:
            return row("identical", note=note)
        return row("unreadable" if packed else "different", note=packed or "not floating point")
    if ref is not None and not all(one.is_float for one in ref.tensors):
        ref, note = None, "the reference cannot be decoded"
    if identical and ref is None:
        return row("identical", note=note)
    errors, equal = _errors(a, b, ref)
    if identical:
        return row("identical", errors, note)
    if equal:
        return row("values", errors, note)
    close, why = _is_close(a, b, errors)
    if not close:
        return row("different", errors, note or why)
    return row("scale" if a.stored == b.stored else "format", errors, note)


@dataclass(frozen=True, slots=True)
class _Errors:
    """Relative RMSE of B against A, and of both against the reference."""

    ab: float | None = None
    a: float | None = None
    b: float | None = None


def _errors(a: Entry, b: Entry, ref: Entry | None) -> tuple[_Errors, bool]:
    """Decode both sides in chunks of rows; also whether every number is equal."""
    n, k = matrix_shape(a.assignment.shape)
    between, first, second = ErrorStats(), ErrorStats(), ErrorStats()
    equal = True
    for span in _spans(n, max(_CHUNK // max(k, 1), 1)):
        x = canonical_rows(a.side.logical, a.assignment, span)
        y = canonical_rows(b.side.logical, b.assignment, span)
        equal = equal and np.array_equal(x, y, equal_nan=True)
        between.add(x, y)
        if ref is not None:
            exact = canonical_rows(ref.side.logical, ref.assignment, span)
            first.add(exact, x)
            second.add(exact, y)
    if ref is None:
        return _Errors(between.relative_rmse), equal
    return _Errors(between.relative_rmse, first.relative_rmse, second.relative_rmse), equal


def _spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _is_close(a: Entry, b: Entry, errors: _Errors) -> tuple[bool, str]:
    """Whether rounding explains the difference; see the module docstring."""
    expected = [_format_error(one) for one in (a, b)]
    if errors.a is not None and errors.b is not None:
        pairs = zip((errors.a, errors.b), expected, strict=True)
        if all(verdict_of(error, own) == "pass" for error, own in pairs):
            return True, ""
        return False, "beyond the error of its format against the reference"
    if a.stored == b.stored and not expected[0] > 0:
        return False, ""
    if a.stored == b.stored and a.stored in FORMATS and FORMATS[a.stored].is_cast:
        return False, ""  # a cast has no scale to search
    bound = max(_GATE * math.hypot(*expected), _EXACT)
    if errors.ab is not None and errors.ab <= bound:
        return True, ""
    return False, f"rounding explains up to {bound:.4f}"


def _format_error(entry: Entry) -> float:
    """The format's own error; of several pieces the largest, 0 where it was never measured."""
    names = entry.stored.split("+")
    return max(FORMATS[name].gaussian_error if name in FORMATS else 0.0 for name in names)


def _same_bytes(a: Entry, b: Entry) -> bool:
    """Whether both are whole tensors of one storage, with the same bytes in every part."""
    one, other = a.whole, b.whole
    if one is None or other is None or (one.format, one.dtype) != (other.format, other.dtype):
        return False
    if one.why != other.why:
        return False
    if one.why:
        pairs = list(zip(a.physical, b.physical, strict=False))
        if len(a.physical) != len(b.physical):
            return False
    else:
        if one.parts.keys() != other.parts.keys():
            return False
        pairs = [(one.parts[part], other.parts[part]) for part in one.parts]
    return all(_same_tensor(a.side.logical, x, b.side.logical, y) for x, y in pairs)


def _same_tensor(a: LogicalSource, x: str, b: LogicalSource, y: str) -> bool:
    one, other = a.source.specs[x], b.source.specs[y]
    if (one.dtype, one.size) != (other.dtype, other.size):
        return False
    if one.shape != other.shape or one.rows <= 1:
        return np.array_equal(a.source.read(x), b.source.read(y))
    step = max(_CHUNK_NBYTES // max(one.row_nbytes, 1), 1)
    return all(
        np.array_equal(a.source.read(x, span), b.source.read(y, span))
        for span in _spans(one.rows, step)
    )
