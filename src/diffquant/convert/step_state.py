"""How far a run has come: one StepState per written weight, one Group per weight that is read.

A group is what several outputs make of the same rows (convert/sharing.py); with one output every
group has one member. Its chunks are worked on by any thread, in any order; results are put together
in chunk order, so that timing leaves no trace.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.cutting import Extents, chunk_extents, chunks_of
from diffquant.convert.gather import float_rows
from diffquant.convert.logical import LogicalSource
from diffquant.convert.plan import Plan, Step
from diffquant.core.tensors import TensorSink
from diffquant.quant.metrics import ErrorStats

__all__ = [
    "ChunkRows",
    "Encoded",
    "Group",
    "Output",
    "StepResult",
    "StepState",
    "alike_together",
    "amax_of",
    "encoding_of",
]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What happened to one weight.

    Attributes:
        key: canonical part-local key.
        error: relative RMSE of decoded against source, None when bytes were copied or not checked.
        digests: sha256 of every chunk's bytes, per output tensor, in chunk order; empty when not
            asked for.
        weighted: the same error weighted by the layer's inputs, sqrt(tr(E H E^T) / tr(W H W^T)):
            that of the layer's output; None unless rounded by feedback and checked.
    """

    key: str
    error: float | None
    digests: Mapping[str, tuple[str, ...]]
    weighted: float | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a run.

    Attributes:
        plan: from make_plan; of several outputs, from cut_alike.
        sink: opened with `plan.specs`.
        importance: canonical key -> (K,) values per column, for formats that weigh errors.
        kept: index of a step -> its result, where the sink holds its bytes already.
        finished: told each other step's index and result once all its bytes are written; called
            from worker threads.
    """

    plan: Plan
    sink: TensorSink
    importance: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    kept: Mapping[int, StepResult] = field(default_factory=dict)
    finished: Callable[[int, StepResult], None] | None = None


@dataclass(slots=True)
class StepState:
    """Mutable progress of one step, shared by the workers that have its chunks."""

    index: int
    step: Step
    output: Output
    chunks: Extents
    extents: Mapping[str, Extents]
    lock: threading.Lock = field(default_factory=threading.Lock)
    left_to_write: int = 0
    stats: Any = None
    partial: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, ErrorStats] = field(default_factory=dict)
    digests: dict[str, dict[int, str]] = field(default_factory=dict)
    carry: Any = None
    costs: dict[int, tuple[float, float]] = field(default_factory=dict)
    result: StepResult | None = None
    bias: Group | None = None  # written after this step, shifted by what its rounding takes
    mean: NDArray[np.float32] | None = None
    shifts: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    shift: NDArray[np.float32] | None = None  # of a bias: what is added to it

    @classmethod
    def of(cls, index: int, output: Output) -> StepState:
        """Begin a step."""
        step = output.plan.steps[index]
        chunks = chunks_of(step)
        keys = [one.spec.key for one in step.packed]
        extents = {key: chunk_extents(step, key) for key in keys}
        return cls(index, step, output, chunks, extents, left_to_write=len(chunks))

    @property
    def is_two_pass(self) -> bool:
        """Whether a statistic of all chunks comes first."""
        return bool(self.step.decision.format) and self.step.passes == 2

    def finish(self) -> StepResult:
        """Put the chunks' sums and digests together, in chunk order: timing leaves no trace."""
        total = ErrorStats()
        for index in sorted(self.errors):
            total.merge(self.errors[index])
        error = total.relative_rmse if self.errors else None
        digests = {
            key: tuple(found[index] for index in sorted(found))
            for key, found in self.digests.items()
        }
        self.carry = None
        weighted = None
        if self.costs:
            noise, signal = (sum(self.costs[i][at] for i in sorted(self.costs)) for at in (0, 1))
            weighted = math.sqrt(noise / signal) if signal > 0 else 0.0
        self.result = StepResult(self.step.key, error, digests, weighted)
        return self.result


@dataclass(slots=True)
class Group:
    """Steps that are made of the same rows, cut alike.

    Attributes:
        states: one per output that has the weight.
        holds: whether what the first pass read is kept for the second.
        held: chunk -> the source with its rows in memory, while it is kept.
        left_to_reduce: chunks that the first pass has not done, where there are two.
    """

    states: tuple[StepState, ...]
    holds: bool = False
    held: dict[int, LogicalSource] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    left_to_reduce: int = 0

    @property
    def chunks(self) -> Extents:
        """Row ranges, the same for every member."""
        return self.states[0].chunks

    @property
    def two_pass(self) -> tuple[StepState, ...]:
        """Members that see every row twice."""
        return tuple(state for state in self.states if state.is_two_pass)


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a codec made of a chunk, kept for the next output that asks for the same.

    Attributes:
        asked: everything the bytes depend on beside the rows.
        parts: as the codec returned them; not to be modified.
        errors: against the rows, None where nobody looked.
    """

    asked: Hashable
    parts: Any
    errors: ErrorStats | None


class ChunkRows:
    """The rows of one chunk: read and decoded when first asked for, and only once.

    `encoded` is the last that was made of them. Outputs that store a weight alike follow each other
    (`alike_together`), so one is enough, and a worker's memory does not grow with their number.
    """

    __slots__ = ("_amax", "_weight", "encoded", "logical", "rows", "step")

    def __init__(self, logical: LogicalSource, step: Step, rows: tuple[int, int]) -> None:
        self.logical, self.step, self.rows = logical, step, rows
        self.encoded: Encoded | None = None
        self._weight: NDArray[np.float32] | None = None
        self._amax: float | None = None

    @property
    def weight(self) -> NDArray[np.float32]:
        """(R, K) float32, adapters applied; not to be modified."""
        if self._weight is None:
            self._weight = float_rows(self.logical, self.step, self.rows)
        return self._weight

    @property
    def amax(self) -> float:
        """Largest magnitude; NaN or inf where there is one."""
        if self._amax is None:
            self._amax = amax_of(self.weight)
        return self._amax


def encoding_of(state: StepState) -> Hashable:
    """What the bytes of a step's chunk depend on beside its rows; None where it stands alone.

    Error feedback has a state of its own per output, and so has a bias that is corrected or that
    waits for what its weight lost.
    """
    step = state.step
    if not step.decision.format or step.rounding != "nearest":
        return None
    if state.shift is not None or state.mean is not None:
        return None
    importance = state.output.importance.get(step.key)
    weights = importance.tobytes() if importance is not None else b""
    return step.decision.format, step.flat, state.stats, weights


def alike_together(states: Sequence[StepState]) -> tuple[StepState, ...]:
    """States in their order, but that those which store a weight alike follow each other."""
    places: dict[Hashable, int] = {}
    for place, state in enumerate(states):
        places.setdefault((state.step.decision.format, state.step.flat), place)
    return tuple(sorted(states, key=lambda one: places[(one.step.decision.format, one.step.flat)]))


def amax_of(values: NDArray[np.float32]) -> float:
    """Largest magnitude; NaN or inf where there is one: extremes carry them along.

    Two extremes and no `abs`: that would be a temporary array.
    """
    if not values.size:
        return 0.0
    most, least = float(values.max()), float(values.min())
    return max(most, -least) if most == most else most
