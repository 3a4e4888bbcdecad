"""run_plan(): the one streaming loop: read rows, apply adapters, encode, pack, write.

Work is cut into chunks of at most CHUNK weights, and each worker holds one chunk, so memory is
workers x a few chunks whatever the model's size. Chunk borders depend on shapes alone, never on the
number of workers, and every chunk is written at its own offset: the bytes are the same for any
thread count. Formats that need a statistic of the whole tensor (two passes) first reduce every
chunk.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.adapters import WHOLE
from diffquant.convert.dialects import Packed
from diffquant.convert.logical import LogicalSource
from diffquant.convert.plan import Plan, Step
from diffquant.core.dtypes import storage_nbytes
from diffquant.core.errors import QuantError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import ByteArray, TensorSink
from diffquant.quant.backends import backend
from diffquant.quant.formats import QuantFormat, format_named, matrix_shape
from diffquant.quant.metrics import ErrorStats

__all__ = [
    "CHUNK",
    "StepResult",
    "chunk_extents",
    "default_workers",
    "peak_nbytes",
    "run_plan",
]

CHUNK = 1 << 20  # weights per chunk: 4 MiB as float32, small enough for a core's cache share
# Live bytes per weight in a worker: float32 source rows and copy, encoded bytes, decoded check,
# and the codec's own buffers. Measured by benchmarks/streaming_memory.py.
_BYTES_PER_WEIGHT = 32


@dataclass(frozen=True, slots=True)
class StepResult:
    """What happened to one weight.

    Attributes:
        key: canonical part-local key.
        error: relative RMSE of decoded against source, None when bytes were copied or not checked.
        digests: sha256 of every chunk's bytes, per output tensor, in chunk order.
    """

    key: str
    error: float | None
    digests: Mapping[str, tuple[str, ...]]


@dataclass(slots=True)
class _State:
    """Mutable progress of one step, shared by the workers that have its chunks."""

    step: Step
    chunks: tuple[tuple[int, int], ...]
    lock: threading.Lock = field(default_factory=threading.Lock)
    left_to_reduce: int = 0
    stats: Any = None
    partial: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, ErrorStats] = field(default_factory=dict)
    digests: dict[str, dict[int, str]] = field(default_factory=dict)


def default_workers() -> int:
    """One worker per processor this process may use."""
    count = getattr(os, "process_cpu_count", None) or os.cpu_count
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return count() or 1


def peak_nbytes(plan: Plan, workers: int) -> int:
    """Predicted anonymous memory of `run_plan` beyond the interpreter's own.

    A step that cannot be cut (a transpose, one long vector) holds its whole tensor.
    """
    largest = max((_largest_chunk(step) for step in plan.steps), default=0)
    return largest * _BYTES_PER_WEIGHT * workers


def run_plan(
    logical: LogicalSource,
    plan: Plan,
    sink: TensorSink,
    *,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
    check: bool = True,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
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

    Raises:
        QuantError: a weight has values its format cannot hold; names the tensor.
    """
    progress.start("quantize" if plan.request.type else "convert", plan.read_nbytes)
    try:
        states = [_State(step, _chunks(step)) for step in plan.steps]
        job = _Job(logical, sink, progress, check, importance or {})
        _run_all(job.tasks(states), workers or default_workers())
    finally:
        progress.stop()
    return tuple(_result(state) for state in states)


def _result(state: _State) -> StepResult:
    total = ErrorStats()
    for index in sorted(state.errors):  # chunk order, so that sums do not depend on timing
        total.merge(state.errors[index])
    error = total.relative_rmse if state.errors else None
    digests = {
        key: tuple(found[index] for index in sorted(found)) for key, found in state.digests.items()
    }
    return StepResult(state.step.key, error, digests)


def _largest_chunk(step: Step) -> int:
    _, k = matrix_shape(step.assignment.shape)
    return max((stop - start) * k for start, stop in _chunks(step))


def _chunks(step: Step) -> tuple[tuple[int, int], ...]:
    """Row ranges, from shapes alone."""
    shape = step.assignment.shape
    n, k = matrix_shape(shape)
    whole = step.assignment.transpose or any(a.reach == WHOLE for a in step.adapters)
    if whole or n <= 1 or n * k <= CHUNK:
        return ((0, n),)
    multiple = step.row_multiple
    rows = max(CHUNK // k // multiple, 1) * multiple
    return tuple((start, min(start + rows, n)) for start in range(0, n, rows))


def chunk_extents(step: Step, key: str) -> tuple[tuple[int, int], ...]:
    """Byte range of every chunk inside the output tensor `key` of a step, in chunk order.

    Constants, whole-tensor parts and copied scales are written with the first chunk alone.
    """
    one = next(packed for packed in step.packed if packed.spec.key == key)
    chunks = _chunks(step)
    if len(chunks) == 1 or not one.part or (step.copies_packed and one.part != "weight"):
        return ((0, one.spec.nbytes),)
    shape = step.assignment.shape
    name = step.decision.format or (step.stored if step.copies_packed else "")
    if not name:
        per_row = one.spec.nbytes // shape[0]
        return tuple((start * per_row, stop * per_row) for start, stop in chunks)
    part = next(p for p in format_named(name).parts if p.name == one.part)
    if not part.per_row:
        return ((0, one.spec.nbytes),)

    def upto(rows: int) -> int:
        return storage_nbytes(part.dtype, part.shape(step.stored_shape(rows))) if rows else 0

    return tuple((upto(start), upto(stop)) for start, stop in chunks)


class _Job:
    """The work on chunks; everything it touches is thread-safe or owned by one chunk."""

    def __init__(
        self,
        logical: LogicalSource,
        sink: TensorSink,
        progress: Progress,
        check: bool,
        importance: Mapping[str, NDArray[np.float32]],
    ) -> None:
        self.logical, self.sink, self.progress, self.check = logical, sink, progress, check
        self.importance = importance

    def tasks(self, states: list[_State]) -> Iterator[_Task]:
        """Every chunk in order; a two-pass step's second pass follows from its last reduction."""
        for state in states:
            two_pass = bool(state.step.decision.format) and state.step.passes == 2
            state.left_to_reduce = len(state.chunks) if two_pass else 0
            for index in range(len(state.chunks)):
                yield _Task(self._reduce if two_pass else self._write, state, index)

    def _reduce(self, state: _State, index: int) -> list[_Task]:
        fmt = format_named(state.step.decision.format)
        weight = self._rows(state.step, state.chunks[index])
        _refuse_non_finite(weight, state.step, fmt)
        state.partial[index] = backend(fmt.codec, "reduce")(weight, None, fmt=fmt.name)
        self._advance(state, index)
        with state.lock:
            state.left_to_reduce -= 1
            if state.left_to_reduce:
                return []
        state.stats = max(state.partial.values())
        return [_Task(self._write, state, i) for i in range(len(state.chunks))]

    def _write(self, state: _State, index: int) -> list[_Task]:
        step, rows = state.step, state.chunks[index]
        if not step.decision.format:
            self._copy(state, index, rows)
        else:
            self._encode(state, index, rows)
        self._advance(state, index)
        return []

    def _advance(self, state: _State, index: int) -> None:
        total, count = state.step.source_nbytes, len(state.chunks)
        done = total * (index + 1) // count - total * index // count
        self.progress.advance(done, state.step.target)

    def _rows(self, step: Step, rows: tuple[int, int]) -> NDArray[np.float32]:
        """Gather the target's rows from its pieces as float32 (R, K), adapters applied."""
        assignment = step.assignment
        _, k = matrix_shape(assignment.shape)
        if len(assignment.shape) < 2 or assignment.transpose:
            weight = self._gather_whole(step)
        else:
            found = [self.logical.read(key, span) for key, span in _spans(step, rows)]
            weight = found[0] if len(found) == 1 else np.concatenate(found)
            weight = weight.reshape(rows[1] - rows[0], k)
        for adapter in step.adapters:
            weight = adapter.apply(weight, rows)
        return np.ascontiguousarray(weight, dtype=np.float32)

    def _gather_whole(self, step: Step) -> NDArray[np.float32]:
        found = []
        for piece in step.assignment.pieces:
            tensor = self.logical.tensors[piece.key]
            if len(tensor.shape) < 2:
                found.append(self.logical.read(piece.key)[:, piece.start : piece.stop])
            else:
                found.append(self.logical.read(piece.key, (piece.start, piece.stop)))
        if len(step.assignment.shape) < 2:
            return np.concatenate([one.reshape(1, -1) for one in found], axis=1)
        return np.concatenate(found).T

    def _encode(self, state: _State, index: int, rows: tuple[int, int]) -> None:
        step = state.step
        fmt = format_named(step.decision.format)
        weight = self._rows(step, rows)
        if not fmt.is_cast:
            _refuse_non_finite(weight, step, fmt)
        weigh: dict[str, Any] = {}
        if fmt.importance != "unused" and not step.flat:  # columns are not those of the layer
            weigh["importance"] = self.importance.get(step.key)
        if step.flat:
            weight = weight.reshape(-1, step.flat[1])
        parts = backend(fmt.codec, "encode")(weight, state.stats, fmt=fmt.name, **weigh)
        decoded = None
        if self.check or fmt.limited:
            decoded = backend(fmt.codec, "decode")(parts, weight.shape, fmt=fmt.name)
            _refuse_overflow(weight, decoded, step, fmt)
        if self.check and decoded is not None:
            stats = ErrorStats()
            stats.add(weight, decoded)
            state.errors[index] = stats
        for one in step.packed:
            extents = chunk_extents(step, one.spec.key)
            if index >= len(extents):
                continue
            if one.part:
                data = np.ascontiguousarray(parts[one.part]).reshape(-1).view(np.uint8)
            else:
                data = np.frombuffer(one.constant, np.uint8)
            self._put(state, index, one, extents[index][0], data)

    def _copy(self, state: _State, index: int, rows: tuple[int, int]) -> None:
        """Copy bytes: rows of plain pieces, or slices of every part of a packed weight."""
        step = state.step
        if step.copies_packed:
            self._copy_packed(state, index)
            return
        one = step.packed[0]
        shape = step.assignment.shape
        if len(shape) < 2 or step.assignment.transpose:
            data = self._raw_whole(step)
            self._put(state, index, one, 0, data)
            return
        found = [self.logical.source.read(key, span) for key, span in _spans(step, rows)]
        data = found[0] if len(found) == 1 else np.concatenate(found)
        per_row = one.spec.nbytes // max(shape[0], 1)
        self._put(state, index, one, rows[0] * per_row, data)

    def _raw_whole(self, step: Step) -> ByteArray:
        found = []
        for piece in step.assignment.pieces:
            spec = self.logical.source.specs[piece.key]
            if len(spec.shape) < 2:
                width = spec.nbytes // max(spec.size, 1)
                found.append(
                    self.logical.source.read(piece.key)[piece.start * width : piece.stop * width]
                )
            else:
                found.append(self.logical.source.read(piece.key, (piece.start, piece.stop)))
        data = np.concatenate(found)
        if not step.assignment.transpose:
            return data
        columns, lines = step.assignment.shape
        width = data.size // max(columns * lines, 1)
        swapped = data.reshape(lines, columns, width).swapaxes(0, 1)
        return np.ascontiguousarray(swapped).reshape(-1)

    def _copy_packed(self, state: _State, index: int) -> None:
        step = state.step
        tensor = self.logical.tensors[step.assignment.pieces[0].key]
        for one in step.packed:
            extents = chunk_extents(step, one.spec.key)
            if index >= len(extents):
                continue
            start, stop = extents[index]
            if one.part:
                data = self._raw_range(tensor.parts[one.part], start, stop)
            else:
                data = np.frombuffer(one.constant, np.uint8)
            self._put(state, index, one, start, data)

    def _raw_range(self, key: str, start: int, stop: int) -> ByteArray:
        """Bytes [start, stop) of a physical tensor; rows are read alone where they are whole."""
        per_row = self.logical.source.specs[key].row_nbytes
        if per_row and not start % per_row and not stop % per_row:
            return self.logical.source.read(key, (start // per_row, stop // per_row))
        return self.logical.source.read(key)[start:stop]

    def _put(self, state: _State, index: int, one: Packed, offset: int, data: ByteArray) -> None:
        self.sink.write(one.spec.key, offset, data)
        digest = hashlib.sha256(data.data).hexdigest()
        with state.lock:
            state.digests.setdefault(one.spec.key, {})[index] = digest


def _spans(step: Step, rows: tuple[int, int]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Cut the target's row range into row ranges of its pieces."""
    at = 0
    for piece in step.assignment.pieces:
        length = piece.stop - piece.start
        start, stop = max(rows[0] - at, 0), min(rows[1] - at, length)
        if start < stop or rows[0] == rows[1]:  # an empty tensor still has its row length
            yield piece.key, (piece.start + start, piece.start + stop)
        at += length


def _refuse_non_finite(weight: NDArray[np.float32], step: Step, fmt: QuantFormat) -> None:
    if not _is_finite(weight):
        bad = int((~np.isfinite(weight)).sum())
        raise QuantError(
            f"{step.key}: {bad} values are NaN or infinite, which {fmt.name} cannot hold; keep the "
            f"tensor with --tensor-type '{step.key}=f32'"
        )


def _is_finite(values: NDArray[np.float32]) -> bool:
    """Whether every element is finite: extremes carry NaN along, and need no temporary array."""
    if not values.size:
        return True
    return math.isfinite(float(values.max())) and math.isfinite(float(values.min()))


def _refuse_overflow(
    weight: NDArray[np.float32], decoded: NDArray[np.float32], step: Step, fmt: QuantFormat
) -> None:
    """A value or a scale beyond the format's range turned into infinity or NaN."""
    if _is_finite(decoded):
        return
    if np.isfinite(weight).all():
        largest = float(np.abs(weight).max())
        raise QuantError(
            f"{step.key}: values up to {largest:.3g} overflow {fmt.name}; keep the "
            f"tensor with --tensor-type '{step.key}=f32' or bf16"
        )


@dataclass(frozen=True, slots=True)
class _Task:
    run: Callable[[_State, int], list[_Task]]
    state: _State
    index: int


def _run_all(tasks: Iterator[_Task], workers: int) -> None:
    """Run tasks on threads; tasks they return go first; the first error stops all."""
    late: deque[_Task] = deque()
    condition = threading.Condition()
    running = 0
    failure: list[BaseException] = []

    def take() -> _Task | None:
        nonlocal running
        with condition:
            while not failure:
                task = late.popleft() if late else next(tasks, None)
                if task is not None:
                    running += 1
                    return task
                if not running:
                    return None
                condition.wait()
            return None

    def work() -> None:
        nonlocal running
        while (task := take()) is not None:
            more: list[_Task] = []
            try:
                more = task.run(task.state, task.index)
            except BaseException as error:  # carried to the caller's thread, raised there
                failure.append(error)
            with condition:
                running -= 1
                late.extend(more)
                condition.notify_all()

    if workers <= 1:
        work()
    else:
        threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():  # a timeout keeps the main thread open to Ctrl-C
                    thread.join(0.2)
        except BaseException as error:
            failure.append(error)
            with condition:
                condition.notify_all()
            for thread in threads:
                thread.join()
            raise
    if failure:
        raise failure[0]
