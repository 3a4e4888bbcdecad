"""Changes of canonical weights, carried over to the weights of another layout.

Adapters speak of rows of canonical weights. An output in another naming, a Diffusers folder, has
the same rows in other tensors: both namings say which rows of the source they are made of, and so
which rows of each other.

    canonical   qkv  <- rows of the source ->  to_k     so rows [N, 2 N) of qkv are rows of to_k
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.adapters import ROWS, WHOLE, Adapter, Mixing
from diffquant.convert.rules import Assignment
from diffquant.core.errors import PolicyError

__all__ = ["Moved", "Turned", "changes_for"]

_Changes = Mapping[str, tuple[Adapter, ...]]


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows [start, stop) of a target that are canonical rows from `at` on."""

    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Moved:
    """An adapter of a canonical weight, for a tensor that has some of its rows."""

    adapter: Adapter
    runs: tuple[_Run, ...]

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.adapter.name

    @property
    def reach(self) -> str:
        """As the adapter's own."""
        return self.adapter.reach

    def apply(self, weight: NDArray[np.float32], rows: tuple[int, int]) -> NDArray[np.float32]:
        """Return the adapted rows."""
        found = weight.copy()
        if self.reach == WHOLE:
            runs = sorted(self.runs, key=lambda run: run.at)
            order = np.concatenate([np.arange(run.start, run.stop) for run in runs])
            first = runs[0].at
            found[order] = self.adapter.apply(weight[order], (first, first + len(order)))
            return found
        for run in self.runs:
            start, stop = max(run.start, rows[0]), min(run.stop, rows[1])
            if start < stop:
                here = slice(start - rows[0], stop - rows[0])
                at = start - run.start + run.at
                found[here] = self.adapter.apply(weight[here], (at, at + stop - start))
        return found


@dataclass(frozen=True, slots=True)
class Turned:
    """An adapter of a canonical weight, for a tensor that is its transpose."""

    adapter: Adapter

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.adapter.name

    @property
    def reach(self) -> str:
        """WHOLE: rows of the one are columns of the other."""
        return WHOLE

    def apply(self, weight: NDArray[np.float32], rows: tuple[int, int]) -> NDArray[np.float32]:
        """Return the adapted weight."""
        found = self.adapter.apply(np.ascontiguousarray(weight.T), (0, weight.shape[1]))
        return np.ascontiguousarray(found.T)


def changes_for(
    changes: _Changes, canonical: Sequence[Assignment], written: Sequence[Assignment]
) -> dict[str, tuple[Adapter, ...]]:
    """Adapters by target of `written`, which is made of the same source rows as `canonical`.

    Raises:
        PolicyError: a changed weight is sliced between the two, or rows that are mixed are parted.
    """
    if not changes:
        return {}
    places = _places(canonical)
    by_target = {one.target: one for one in canonical}
    found: dict[str, tuple[Adapter, ...]] = {}
    for one in written:
        runs: dict[str, list[_Run]] = {}
        for run, key in _runs(one, places):
            if key in changes:
                runs.setdefault(key, []).append(run)
        for key, rows in runs.items():
            canonical_one = by_target[key]
            if _is_turned(one, canonical_one):
                turned = tuple(Turned(change) for change in changes[key])
                found[one.target] = found.get(one.target, ()) + turned
                continue
            if (one.transpose, one.axis) != (canonical_one.transpose, canonical_one.axis):
                raise PolicyError(
                    f"{one.target} is {key} with its axes exchanged, to which "
                    f"{changes[key][0].name} cannot be applied: write a single file in its place"
                )
            found[one.target] = found.get(one.target, ()) + _moved(
                changes[key], one, canonical_one, tuple(rows)
            )
    return found


def _is_turned(written: Assignment, canonical: Assignment) -> bool:
    """Whether a matrix is the whole canonical one, transposed."""
    alike = written.pieces == canonical.pieces and written.axis == canonical.axis == 0
    exchanged = written.shape == canonical.shape[::-1] and len(written.shape) == 2
    return alike and exchanged and written.transpose != canonical.transpose


def _places(canonical: Sequence[Assignment]) -> dict[str, list[tuple[int, int, str, int]]]:
    """Source key -> (start, stop, canonical key, canonical row of start)."""
    places: dict[str, list[tuple[int, int, str, int]]] = {}
    for one in canonical:
        at = 0
        for piece in one.pieces:
            places.setdefault(piece.key, []).append((piece.start, piece.stop, one.target, at))
            at += piece.stop - piece.start
    return places


def _runs(
    written: Assignment, places: Mapping[str, Sequence[tuple[int, int, str, int]]]
) -> Iterator[tuple[_Run, str]]:
    at = 0
    for piece in written.pieces:
        for start, stop, key, row in places.get(piece.key, ()):
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                here = at + first - piece.start
                yield _Run(here, here + last - first, row + first - start), key
        at += piece.stop - piece.start


def _moved(
    adapters: tuple[Adapter, ...],
    written: Assignment,
    canonical: Assignment,
    runs: tuple[_Run, ...],
) -> tuple[Adapter, ...]:
    """The adapters themselves where the two tensors are one; rows that must be together must be."""
    rows = canonical.shape[0] if canonical.shape else 1
    if runs == (_Run(0, rows, 0),) and written.shape == canonical.shape:
        return adapters
    held = [(run.at, run.at + run.stop - run.start) for run in runs]
    for one in adapters:
        if isinstance(one, Mixing) and (why := one.parted(held)):
            raise PolicyError(f"{written.target}: {why}: write a single file in its place")
    have = sum(run.stop - run.start for run in runs)
    if have < rows and any(one.reach != ROWS for one in adapters):
        first = min(run.at for run in runs)
        if max(run.at + run.stop - run.start for run in runs) - first != have:
            raise PolicyError(
                f"{adapters[0].name} needs rows of {canonical.target} that are not together in "
                f"{written.target}: write a single file in its place"
            )
    return tuple(Moved(one, runs) for one in adapters)
