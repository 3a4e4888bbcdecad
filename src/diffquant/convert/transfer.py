"""TransferredSource: a checkpoint with the difference of two others added to it.

    target + weight * (tuned - base)

in float32, row by row as it is read: plans see one source, so that everything that can be written
of the target can be written of this, quantized or not, and memory stays that of a chunk. The three
may differ in layout, container and dtype; rows of `tuned` and `base` are found in the target's own
naming. What they lack, or have in another shape, stays as the target has it, and is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diffquant.convert.binding import bind
from diffquant.convert.canonical_rows import canonical_rows
from diffquant.convert.logical import LogicalSource
from diffquant.convert.match import Match, PartMatch, to_canonical, to_layout
from diffquant.convert.recognise import recognise
from diffquant.convert.rules import Assignment
from diffquant.convert.view import SourceView
from diffquant.core.errors import ArchitectureError, PolicyError, QuantError, UsageError, shorten
from diffquant.core.floats import PLAIN_FLOATS, float32_of
from diffquant.core.tensors import ByteArray, TensorSource, TensorSpec
from diffquant.io import open_source
from diffquant.io.reading import find_spec
from diffquant.quant.backends import backend
from diffquant.quant.formats import format_named

__all__ = ["Transfer", "TransferredSource", "transferred"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A difference to add: of which files, and how much of it."""

    tuned: Path
    base: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Change:
    """Where the rows of one of the target's tensors are in the other two."""

    tuned: Assignment
    base: Assignment


class TransferredSource(SourceView):
    """A TensorSource over three: bytes of the target, changed where `changes` says so."""

    def __init__(
        self,
        target: TensorSource,
        changes: Mapping[str, _Change],
        sides: tuple[LogicalSource, LogicalSource],
        weight: float,
        *,
        exact: bool,
        notes: tuple[str, ...],
    ) -> None:
        super().__init__(target)
        self.notes = notes
        self.specs: Mapping[str, TensorSpec] = {
            key: replace(spec, dtype="F32") if exact and key in changes else spec
            for key, spec in target.specs.items()
        }
        self.nbytes = sum(spec.nbytes for spec in self.specs.values())
        self._changes = changes
        self._sides = sides
        self._weight = np.float32(weight)

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """Return the bytes of `rows` (half open; all when None) as a flat array."""
        spec = find_spec(self.specs, key, self.path)
        raw = self._source.read(key, rows)
        change = self._changes.get(key)
        if change is None:
            return raw
        span = rows or (0, spec.rows)
        values = float32_of(raw, self._source.specs[key].dtype).reshape(span[1] - span[0], -1)
        tuned, base = (
            canonical_rows(side, one, span)
            for side, one in zip(self._sides, (change.tuned, change.base), strict=True)
        )
        changed = values + self._weight * (tuned - base)
        fmt = format_named(spec.dtype.lower())
        stored = backend(fmt.codec, "encode")(changed, None, fmt=fmt.name)["weight"]
        if spec.dtype == "F16" and np.isfinite(changed).all() and not np.isfinite(stored).all():
            most = np.abs(changed).max()
            raise QuantError(f"{key}: values up to {most:.3g} overflow float16; use --dtype bf16")
        found: ByteArray = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        return found


@contextlib.contextmanager
def transferred(
    target: TensorSource, transfer: Transfer | None, *, exact: bool
) -> Iterator[TensorSource]:
    """The target with a difference added; the target itself where there is none to add.

    Args:
        target: an opened checkpoint with plain weights.
        transfer: the difference.
        exact: show changed tensors as F32, for outputs that cast or quantize; else they keep the
            target's dtype, rounded once.

    Raises:
        ArchitectureError: the three are not of one architecture.
        PolicyError: weights of the target that would change are packed.
        UsageError: nothing would change.
    """
    if transfer is None:
        yield target
        return
    with open_source(transfer.tuned) as tuned, open_source(transfer.base) as base:
        logical = [bind(one) for one in (target, tuned, base)]
        matches = [
            recognise(one.specs(), one.source.metadata, one.source.configs) for one in logical
        ]
        slugs = [one.architecture for one in matches]
        if len(set(slugs)) > 1:
            raise ArchitectureError(
                f"a difference needs models of one architecture: {target.path} is {slugs[0]}, "
                f"{transfer.tuned} is {slugs[1]}, {transfer.base} is {slugs[2]}"
            )
        changes, left = _changes(logical[0], matches)
        if not changes:
            raise UsageError(f"{transfer.tuned}: no tensor of {target.path} would change")
        notes = [
            f"{len(changes)} tensors get {transfer.weight:g} x ({transfer.tuned.name} - "
            f"{transfer.base.name})"
        ]
        notes += [
            f"{len(keys)} tensors stay as they are ({why}): {shorten(keys, 3)}"
            for why, keys in left.items()
        ]
        packed = [
            one.source.path.name
            for one in logical[1:]
            if any(tensor.is_quantized for tensor in one.tensors.values())
        ]
        if packed:
            notes.append(f"{shorten(packed)}: packed weights; their rounding is transferred too")
        yield TransferredSource(
            target,
            changes,
            (logical[1], logical[2]),
            transfer.weight,
            exact=exact,
            notes=(*getattr(target, "notes", ()), *notes),
        )


def _changes(
    target: LogicalSource, matches: list[Match]
) -> tuple[dict[str, _Change], dict[str, list[str]]]:
    """Tensors of the target that both others have in the same shape; the rest by reason."""
    changes: dict[str, _Change] = {}
    left: dict[str, list[str]] = {}
    for part in matches[0].parts:
        others = [match.part(part.name) for match in matches[1:]]
        keys = [part.prefix + key for key in part.shapes]
        if others[0] is None or others[1] is None:
            left.setdefault(f"{part.name} is not in both others", []).extend(keys)
            continue
        tuned, base = (_in_naming(one, part) for one in (others[0], others[1]))
        for local, shape in part.shapes.items():
            key = part.prefix + local
            pair = tuned.get(local), base.get(local)
            tensor = target.tensors[key]
            if pair[0] is None or pair[1] is None:
                left.setdefault("not in both others", []).append(key)
            elif pair[0].shape != shape or pair[1].shape != shape:
                left.setdefault("another shape there", []).append(key)
            elif tensor.is_quantized:
                raise PolicyError(
                    f"{key} is packed ({tensor.format or tensor.dtype}): a difference is added to "
                    "plain weights; use an unquantized target"
                )
            elif tensor.is_as_stored and tensor.dtype in PLAIN_FLOATS and pair[0].pieces:
                changes[key] = _Change(pair[0], pair[1])
            else:
                left.setdefault("no plain floating point numbers", []).append(key)
    return changes, left


def _in_naming(part: PartMatch, like: PartMatch) -> dict[str, Assignment]:
    """Local keys as `like` has them -> where their rows are in the source of `part`."""
    if like.layout in ("canonical", "diffusers"):
        return {one.target: one for one in to_layout(part, like.layout) if not one.axis}
    mine = {one.target: one for one in to_canonical(part)}
    found = {}
    for one in to_canonical(like):
        whole = len(one.pieces) == 1 and not one.transpose and not one.axis
        if whole and one.target in mine:
            found[one.pieces[0].key.removeprefix(like.prefix)] = mine[one.target]
    return found
