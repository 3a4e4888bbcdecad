"""run_plan(): the one streaming loop: read rows, apply adapters, encode, pack, write.

Work is cut into chunks of at most CHUNK weights (convert/cutting.py), and each worker holds one
chunk, so memory is workers x a few chunks whatever the model's size. Chunk borders depend on shapes
alone, never on the number of workers, and every chunk is written at its own offset: the bytes are
the same for any thread count. Formats that need a statistic of the whole tensor (two passes) first
reduce every chunk.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.cutting import Extents, chunk_extents, chunks_of
from diffquant.convert.dialects import Packed
from diffquant.convert.gather import float_rows, raw_range, raw_rows
from diffquant.convert.logical import LogicalSource
from diffquant.convert.plan import Plan, Step
from diffquant.convert.roundings import feedback_nbytes
from diffquant.convert.workers import Task, default_workers, run_tasks
from diffquant.core.errors import QuantError
from diffquant.core.floats import float32_of
from diffquant.core.heap import keep_freed_pages
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import ByteArray, TensorSink
from diffquant.io.inputs import InputsFile
from diffquant.quant.backends import backend
from diffquant.quant.formats import QuantFormat, format_named, matrix_shape
from diffquant.quant.metrics import ErrorStats

__all__ = ["StepResult", "peak_nbytes", "run_plan"]

# Anonymous memory of the interpreter, numba and compiled kernels: 70 MiB measured, and some room.
# Live bytes per weight in a worker: the stored row, float32, encoded bytes and the decoded check,
# 11 measured; rows that are brought together or turned are copied more often.
_FIXED_NBYTES = 80 << 20
_BYTES_PER_WEIGHT = 16
_BYTES_PER_WHOLE_WEIGHT = 28
# Scales per element, candidates of every run, columns in another order (quant/rounding).
_BYTES_PER_ROUNDED_WEIGHT = 32


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


@dataclass(slots=True)
class _State:
    """Mutable progress of one step, shared by the workers that have its chunks."""

    index: int
    step: Step
    chunks: Extents
    extents: Mapping[str, Extents]
    lock: threading.Lock = field(default_factory=threading.Lock)
    left_to_reduce: int = 0
    left_to_write: int = 0
    stats: Any = None
    partial: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, ErrorStats] = field(default_factory=dict)
    digests: dict[str, dict[int, str]] = field(default_factory=dict)
    carry: Any = None
    costs: dict[int, tuple[float, float]] = field(default_factory=dict)
    result: StepResult | None = None
    bias: _State | None = None  # written after this step, shifted by what its rounding takes
    mean: NDArray[np.float32] | None = None
    shifts: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    shift: NDArray[np.float32] | None = None  # of a bias: what is added to it

    @classmethod
    def of(cls, index: int, step: Step) -> _State:
        chunks = chunks_of(step)
        keys = [one.spec.key for one in step.packed]
        extents = {key: chunk_extents(step, key) for key in keys}
        return cls(index, step, chunks, extents, left_to_write=len(chunks))

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


def peak_nbytes(plan: Plan, workers: int, *, beside: int = 0) -> int:
    """Predicted anonymous memory of the process while it runs the plan: an upper bound.

    A step that cannot be cut (a transpose, one long vector) holds its whole tensor. `beside` is
    what other work needs, before or after.
    """
    running = workers * max(map(_live_nbytes, plan.steps), default=0)
    return _FIXED_NBYTES + max(running, beside)


def run_plan(
    logical: LogicalSource,
    plan: Plan,
    sink: TensorSink,
    *,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
    check: bool = True,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    hashes: bool = True,
    kept: Mapping[int, StepResult] | None = None,
    finished: Callable[[int, StepResult], None] | None = None,
) -> tuple[StepResult, ...]:
    """Run every step and write every byte; the caller commits the sink.

    Args:
        logical: the bound source the plan was made from.
        plan: from make_plan.
        sink: opened with `plan.specs`.
        workers: threads; None means one per processor.
        progress: told about source bytes.
        check: decode each chunk again and measure the error before it is written.
        importance: canonical key -> (K,) values per column, for formats that weigh errors.
        hashes: take the sha256 of every chunk written.
        kept: index of a step -> its result, where the sink holds its bytes already.
        finished: told each other step's index and result once all its bytes are written; called
            from worker threads.

    Raises:
        QuantError: a weight has values its format cannot hold; names the tensor.
    """
    progress.start("quantize" if plan.request.type else "convert", plan.read_nbytes)
    results = dict(kept or {})
    try:
        for index in results:
            step = plan.steps[index]
            progress.advance(step.source_nbytes * step.passes, step.target)
        states = [_State.of(i, step) for i, step in enumerate(plan.steps) if i not in results]
        _pair_biases(states, plan)
        weigh = importance or {}
        job = _Job(logical, sink, progress, check, hashes, weigh, finished, plan.inputs)
        with keep_freed_pages():
            run_tasks(job.tasks(states), workers or default_workers())
    finally:
        progress.stop()
    results |= {state.index: state.result for state in states if state.result is not None}
    return tuple(results[index] for index in range(len(plan.steps)))


def _pair_biases(states: Sequence[_State], plan: Plan) -> None:
    """Let every bias that is corrected wait for its weight."""
    by_index = {state.index: state for state in states}
    for fix in plan.bias_fixes:
        weight, bias = by_index.get(fix.weight), by_index.get(fix.bias)
        if weight is not None and bias is not None:
            weight.bias, weight.mean = bias, fix.mean


def _live_nbytes(step: Step) -> int:
    shape, pieces = step.assignment.shape, step.assignment.pieces
    _, k = matrix_shape(shape)
    weights = max((stop - start) * k for start, stop in chunks_of(step))
    copied = step.assignment.transpose or step.adapters or len(shape) < 2 or len(pieces) > 1
    nbytes = weights * (_BYTES_PER_WHOLE_WEIGHT if copied else _BYTES_PER_WEIGHT)
    if step.rounding != "nearest":
        nbytes += weights * _BYTES_PER_ROUNDED_WEIGHT
    return nbytes + (feedback_nbytes(k) if step.rounding == "feedback" else 0)


@dataclass(frozen=True, slots=True)
class _Job:
    """The work on chunks; everything it touches is thread-safe or owned by one chunk."""

    logical: LogicalSource
    sink: TensorSink
    progress: Progress
    check: bool
    hashes: bool
    importance: Mapping[str, NDArray[np.float32]]
    finished: Callable[[int, StepResult], None] | None
    inputs: InputsFile | None = None

    def tasks(self, states: list[_State]) -> Iterator[Task]:
        """Every chunk in order; a two-pass step's second pass follows from its last reduction.

        So does a corrected bias from its weight's last chunk.
        """
        waiting = {state.bias.index for state in states if state.bias is not None}
        for state in states:
            if state.index in waiting:
                continue
            two_pass = bool(state.step.decision.format) and state.step.passes == 2
            state.left_to_reduce = len(state.chunks) if two_pass else 0
            for index in range(len(state.chunks)):
                yield functools.partial(self._reduce if two_pass else self._write, state, index)

    def _reduce(self, state: _State, index: int) -> list[Task]:
        fmt = format_named(state.step.decision.format)
        weight = float_rows(self.logical, state.step, state.chunks[index])
        if not math.isfinite(_amax(weight)):
            raise _not_finite(weight, state.step, fmt)
        state.partial[index] = backend(fmt.codec, "reduce")(weight, None, fmt=fmt.name)
        self._advance(state, index)
        with state.lock:
            state.left_to_reduce -= 1
            if state.left_to_reduce:
                return []
        partial = [state.partial[i] for i in range(len(state.chunks))]
        state.stats = _TOGETHER[fmt.statistic](partial)
        return [functools.partial(self._write, state, i) for i in range(len(state.chunks))]

    def _write(self, state: _State, index: int) -> list[Task]:
        step = state.step
        if step.decision.format:
            self._encode(state, index)
        elif step.copies_packed:
            self._copy_packed(state, index)
        else:
            one, rows = step.packed[0], state.chunks[index]
            self._put(state, index, one, raw_rows(self.logical.source, step, rows))
        self._advance(state, index)
        with state.lock:
            state.left_to_write -= 1
            if state.left_to_write:
                return []
        result = state.finish()
        if self.finished is not None:
            self.finished(state.index, result)
        return self._bias_tasks(state)

    def _bias_tasks(self, state: _State) -> list[Task]:
        """Writing of the bias that was waiting for this weight."""
        bias = state.bias
        if bias is None:
            return []
        parts = [state.shifts[index] for index in sorted(state.shifts)]
        bias.shift = np.concatenate(parts).astype(np.float32)
        return [functools.partial(self._write, bias, index) for index in range(len(bias.chunks))]

    def _advance(self, state: _State, index: int) -> None:
        total, count = state.step.source_nbytes, len(state.chunks)
        done = total * (index + 1) // count - total * index // count
        self.progress.advance(done, state.step.target)

    def _encode(self, state: _State, index: int) -> None:
        step = state.step
        fmt = format_named(step.decision.format)
        weight = float_rows(self.logical, step, state.chunks[index])
        if state.shift is not None:
            weight = weight + state.shift[None, :]  # a vector is one row
        amax = _amax(weight)
        if not fmt.is_cast and not math.isfinite(amax):
            raise _not_finite(weight, step, fmt)
        weigh: dict[str, Any] = {}
        if fmt.importance != "unused" and not step.flat:  # columns are not those of the layer
            weigh["importance"] = self.importance.get(step.key)
        if step.flat:
            weight = weight.reshape(-1, step.flat[1])
        if step.rounding == "nearest":
            parts = backend(fmt.codec, "encode")(weight, state.stats, fmt=fmt.name, **weigh)
        else:
            parts = self._round(state, weight, fmt)
        if self.check or state.mean is not None or (fmt.limited and not amax <= fmt.safe_amax):
            decoded = backend(fmt.codec, "decode")(parts, weight.shape, fmt=fmt.name)
            _refuse_overflow(weight, decoded, step, fmt)
            if self.check:
                stats = ErrorStats()
                stats.add(weight, decoded)
                state.errors[index] = stats
                if state.carry is not None:
                    state.costs[index] = state.carry.costs(weight, decoded)
            if state.mean is not None:
                lost = (weight - decoded).reshape(-1, state.mean.size)
                state.shifts[index] = np.einsum("rk,k->r", lost, state.mean, dtype=np.float64)
        for one in step.packed:
            if index < len(state.extents[one.spec.key]):
                data = one.data(parts[one.part] if one.part else None)
                self._put(state, index, one, data)

    def _round(self, state: _State, weight: NDArray[np.float32], fmt: QuantFormat) -> Any:  # noqa: ANN401 - parts
        """Encode with searched scales, and with error feedback where the plan says so."""
        from diffquant.quant.rounding.encode import encode  # compiled only where it is asked for
        from diffquant.quant.rounding.feedback import carry_of

        step = state.step
        if step.rounding == "feedback":
            assert self.inputs is not None
            with state.lock:  # the first chunk prepares it, the others wait
                if state.carry is None:
                    state.carry = carry_of(
                        self.inputs.covariance(step.key),
                        rotation=format_named(step.decision.format).rotation,
                    )
        known = self.importance.get(step.key)
        return encode(weight, state.stats, fmt=fmt.name, importance=known, carry=state.carry)

    def _copy_packed(self, state: _State, index: int) -> None:
        """Copy slices of every part of a packed weight."""
        step = state.step
        tensor = self.logical.tensors[step.assignment.pieces[0].key]
        for one in step.packed:
            extents = state.extents[one.spec.key]
            if index < len(extents):
                key = tensor.parts.get(one.part) or tensor.beside.get(one.part)
                if key:
                    stored = self.logical.source.specs[key]
                    if stored.dtype != one.spec.dtype and one.spec.dtype == "F32":
                        whole = float32_of(self.logical.source.read(key), stored.dtype)
                        data = one.data(whole)  # a scale of 16 bits, that loaders stop at
                    else:
                        data = raw_range(self.logical.source, key, *extents[index])
                else:
                    held = tensor.constants.get(one.part)
                    data = one.data(None if held is None else np.float32(held))
                self._put(state, index, one, data)

    def _put(self, state: _State, index: int, one: Packed, data: ByteArray) -> None:
        key = one.spec.key
        self.sink.write(key, state.extents[key][index][0], data)
        if self.hashes:
            digest = hashlib.sha256(data.data).hexdigest()
            with state.lock:
                state.digests.setdefault(key, {})[index] = digest


def _sums(partial: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Sum up in the order of the chunks: the same for any number of workers."""
    return sum(total for total, _ in partial), sum(count for _, count in partial)


_TOGETHER: Mapping[str, Callable[[Any], Any]] = {"max": max, "mean": _sums}


def _amax(values: NDArray[np.float32]) -> float:
    """Largest magnitude; NaN or inf where there is one: extremes carry them along.

    Two extremes and no `abs`: that would be a temporary array.
    """
    if not values.size:
        return 0.0
    most, least = float(values.max()), float(values.min())
    return max(most, -least) if most == most else most


def _not_finite(weight: NDArray[np.float32], step: Step, fmt: QuantFormat) -> QuantError:
    bad = int((~np.isfinite(weight)).sum())
    return QuantError(
        f"{step.key}: {bad} values are NaN or infinite, which {fmt.name} cannot hold; keep the "
        f"tensor with --tensor-type '{step.key}=f32'"
    )


def _refuse_overflow(
    weight: NDArray[np.float32], decoded: NDArray[np.float32], step: Step, fmt: QuantFormat
) -> None:
    """A value or a scale beyond the format's range turned into infinity or NaN."""
    if math.isfinite(_amax(decoded)):
        return
    if np.isfinite(weight).all():
        largest = float(np.abs(weight).max())
        raise QuantError(
            f"{step.key}: values up to {largest:.3g} overflow {fmt.name}; keep the "
            f"tensor with --tensor-type '{step.key}=f32' or bf16"
        )
