"""from_weights(): sensitivity from the weights alone, for models that cannot be run here.

Every tensor is read once, a sample of its rows at a time, and encoded in every candidate format.
The error of a tensor in a format is its squared relative error, weighted by the importance of its
columns where a matrix knows them::

    error(t, f) = sum_rk h_k (W - Q_f(W))_rk^2 / sum_rk h_k W_rk^2        h_k = E[x_k^2], else 1

With independent rounding errors that is the squared relative error of the layer's output. Layers
are taken to matter alike: what a layer's output does to the picture only a run of the model tells
(`diffquant calibrate --sensitivity`). Sums over layers are therefore a ranking of mixes, not a
forecast in decibels.

Memory: a worker holds one sample of at most about SAMPLE weights (a whole tensor where its rows
cannot be read apart). Formats with one scale for the whole tensor take it from the sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.adapters import WHOLE
from diffquant.convert.gather import float_rows
from diffquant.convert.logical import LogicalSource
from diffquant.convert.sensitivity import Sensitivity
from diffquant.convert.step import Step
from diffquant.convert.workers import Task, default_workers, run_tasks
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS, QuantFormat, matrix_shape

__all__ = ["SAMPLE", "Wanted", "from_weights"]

SAMPLE = 1 << 17  # weights of a tensor that are encoded
_RUNS = 16  # places in a tensor that a sample is taken from
_UNIT = "sum over layers of the squared relative error of {what}"

_Values = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor, as a step of a plan reads it, and the formats that its error is wanted in."""

    step: Step
    formats: tuple[str, ...]


def from_weights(
    logical: LogicalSource,
    wanted: Sequence[Wanted],
    *,
    architecture: str,
    source: str,
    importance: Mapping[str, _Values] | None = None,
    matrix: str = "",
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Sensitivity:
    """Measure what each format costs each tensor, by encoding a sample of it.

    Args:
        logical: the bound source.
        wanted: tensors and formats.
        architecture: slug.
        source: fingerprint.
        importance: canonical key -> (K,) mean squares of the layer's input.
        matrix: name of the importance matrix, for the context.
        workers: threads; the numbers do not depend on how many.
        progress: told about tensors.

    Returns:
        Errors of the formats that can hold the sample: those that would overflow, weights that are
        not finite, and formats that need importance where there is none, are left out.
    """
    known = importance or {}
    found: dict[str, dict[str, float]] = {}

    def measure(one: Wanted) -> list[Task]:
        found[one.step.key] = dict(_errors(logical, one, known.get(one.step.key)))
        progress.advance(1, one.step.key)
        return []

    progress.start("measure", len(wanted), "tensors")
    try:
        tasks = (functools.partial(measure, one) for one in wanted)
        run_tasks(tasks, workers or default_workers())
    finally:
        progress.stop()
    weighed = sum(one.step.key in known for one in wanted)
    what = "their outputs, by weights and importance" if weighed else "their weights"
    context = {"sample": f"up to {SAMPLE} weights of a tensor"}
    if weighed:
        context["importance"] = f"{matrix}: {weighed} of {len(wanted)} tensors"
    return Sensitivity(
        architecture,
        "weights",
        _UNIT.format(what=what),
        source,
        {one.step.key: found[one.step.key] for one in wanted},
        context,
    )


def _errors(
    logical: LogicalSource, one: Wanted, importance: _Values | None
) -> Iterator[tuple[str, float]]:
    """(format, error) of those that can hold the sample."""
    weight = _sample(logical, one.step, [FORMATS[name] for name in one.formats])
    finite = bool(np.isfinite(weight).all())
    if not finite:  # only what packs nothing holds them
        yield from ((name, 0.0) for name in one.formats if FORMATS[name].is_cast)
        return
    if one.step.flat:  # columns are cut across
        weight, importance = weight.reshape(-1, one.step.flat[1]), None
    columns = None if importance is None else importance.astype(np.float64)
    power = _power(weight, columns)
    for name in one.formats:
        fmt = FORMATS[name]
        if fmt.importance == "required" and importance is None:
            continue
        stats = backend(fmt.codec, "reduce")(weight, None, fmt=name) if fmt.passes == 2 else None
        weigh = {} if fmt.importance == "unused" else {"importance": importance}
        parts = backend(fmt.codec, "encode")(weight, stats, fmt=name, **weigh)
        decoded = backend(fmt.codec, "decode")(parts, weight.shape, fmt=name)
        if not np.isfinite(decoded).all():
            continue
        noise = _power(weight - decoded, columns)
        yield name, noise / power if power else 0.0


def _power(values: _Values, columns: NDArray[np.float64] | None) -> float:
    """Sum of squares, weighted by column."""
    squares = np.einsum("rk,rk->k", values, values, dtype=np.float64)
    return float(squares.sum() if columns is None else squares @ columns)


def _sample(logical: LogicalSource, step: Step, formats: Sequence[QuantFormat]) -> _Values:
    """(R, K) rows from evenly spaced places, whole blocks of every format."""
    shape = step.assignment.shape
    n, k = matrix_shape(shape)
    multiple = math.lcm(step.row_multiple, *(fmt.row_multiple(shape) for fmt in formats))
    whole = step.assignment.transpose or any(one.reach == WHOLE for one in step.adapters)
    runs = tuple(_runs(n, k, multiple))
    if whole:
        weight = float_rows(logical, step, (0, n))
        return np.ascontiguousarray(np.concatenate([weight[a:b] for a, b in runs]))
    return np.concatenate([float_rows(logical, step, rows) for rows in runs])


def _runs(n: int, k: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Row ranges of at most about SAMPLE weights together; all rows where they are no more."""
    if n * k <= SAMPLE or n <= multiple:
        yield 0, n
        return
    units = n // multiple  # what is left at the end is not sampled
    wanted = max(SAMPLE // (k * multiple), 1)
    count = min(_RUNS, wanted, units)
    each = max(wanted // count, 1)
    if each * count >= units:
        yield 0, units * multiple
        return
    for index in range(count):
        at = index * (units - each) // max(count - 1, 1)
        yield at * multiple, (at + each) * multiple
