"""run_plans(): the one streaming loop: read rows, apply adapters, encode, pack, write.

Work is cut into chunks of at most CHUNK weights (convert/cutting.py), and each worker holds one
chunk, so memory is workers x a few chunks whatever the model's size. Chunk borders depend on shapes
alone, never on the number of workers, and every chunk is written at its own offset: the bytes are
the same for any thread count. Formats that need a statistic of the whole tensor (two passes) first
reduce every chunk.

Several outputs of one source are made in one pass: what they share (convert/sharing.py) is read,
decoded and adapted once per chunk, then encoded for one output after the other; those that store
a weight in the same format are written from the same encoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.chunk_work import Encoder, reduce_chunk, statistic_of, write_chunk
from diffquant.convert.logical import LogicalSource
from diffquant.convert.once import reading_once
from diffquant.convert.peak import peak_nbytes, peak_together
from diffquant.convert.plan import Plan
from diffquant.convert.sharing import is_held, shared_steps
from diffquant.convert.step_state import (
    ChunkRows,
    Group,
    Output,
    StepResult,
    StepState,
    alike_together,
)
from diffquant.convert.workers import Task, default_workers, run_tasks
from diffquant.core.heap import keep_freed_pages
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import TensorSink
from diffquant.quant.cards import NO_CARDS, Cards

__all__ = ["Output", "StepResult", "peak_nbytes", "peak_together", "run_plan", "run_plans"]


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
    cards: Cards = NO_CARDS,
) -> tuple[StepResult, ...]:
    """Run one plan; arguments as `Output` and `run_plans` have them, and its errors."""
    output = Output(plan, sink, importance or {}, kept or {}, finished)
    (results,) = run_plans(
        logical,
        (output,),
        workers=workers,
        progress=progress,
        check=check,
        hashes=hashes,
        cards=cards,
    )
    return results


def run_plans(
    logical: LogicalSource,
    outputs: Sequence[Output],
    *,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
    check: bool = True,
    hashes: bool = True,
    cards: Cards = NO_CARDS,
) -> tuple[tuple[StepResult, ...], ...]:
    """Run every step of every output and write every byte; the caller commits the sinks.

    Args:
        logical: the bound source the plans were made from.
        outputs: what is written; several plans went through cut_alike together.
        workers: threads; None means one per processor.
        progress: told about source bytes, for each output that they went into.
        check: decode each chunk again and measure the error before it is written.
        hashes: take the sha256 of every chunk written.
        cards: that the plans were placed on (convert/placing.py).

    Returns:
        Per output, a result per step.

    Raises:
        QuantError: a weight has values its format cannot hold; names the tensor.
    """
    named = any(one.plan.request.type for one in outputs)
    progress.start("quantize" if named else "convert", sum(one.plan.read_nbytes for one in outputs))
    count = workers or default_workers()
    try:
        for one in outputs:
            for index in one.kept:
                step = one.plan.steps[index]
                progress.advance(step.source_nbytes * step.passes, step.target)
        groups = _groups(logical, outputs, count)
        job = _Job(logical, progress, check, hashes, _on_cards(cards))
        with keep_freed_pages():
            run_tasks(job.tasks(groups), count)
    finally:
        progress.stop()
    found = [dict(one.kept) for one in outputs]
    place = {id(one): number for number, one in enumerate(outputs)}
    for state in (state for group in groups for state in group.states):
        if state.result is not None:
            found[place[id(state.output)]][state.index] = state.result
    return tuple(
        tuple(results[index] for index in range(len(one.plan.steps)))
        for one, results in zip(outputs, found, strict=True)
    )


def _groups(logical: LogicalSource, outputs: Sequence[Output], workers: int) -> tuple[Group, ...]:
    """What is left to do, in the order of the first plan that has it."""
    groups, by_step = [], {}
    for members in shared_steps([one.plan for one in outputs]):
        left = [(plan, index) for plan, index in members if index not in outputs[plan].kept]
        if not left:
            continue
        states = tuple(StepState.of(index, outputs[plan]) for plan, index in left)
        held = is_held(logical, [one.step for one in states], workers)
        group = Group(alike_together(states), holds=held)
        by_step.update(dict.fromkeys(left, group))
        groups.append(group)
    for plan, one in enumerate(outputs):
        for fix in one.plan.bias_fixes:  # a bias that is corrected waits for its weight
            weight, bias = by_step.get((plan, fix.weight)), by_step.get((plan, fix.bias))
            if weight is not None and bias is not None:
                (state,) = (s for s in weight.states if s.output is one)
                state.bias, state.mean = bias, fix.mean
    return tuple(groups)


def _on_cards(cards: Cards) -> Encoder | None:
    if not cards.devices:
        return None
    from diffquant.quant.staging import Stages  # torch

    return Stages(cards.devices)


@dataclass(frozen=True, slots=True)
class _Job:
    """The work on chunks; everything it touches is thread-safe or owned by one chunk."""

    logical: LogicalSource
    progress: Progress
    check: bool
    hashes: bool
    cards: Encoder | None

    def tasks(self, groups: Sequence[Group]) -> Iterator[Task]:
        """Every chunk in order; a second pass follows from a group's last reduction.

        So does a corrected bias from its weight's last chunk.
        """
        waiting = {
            id(state.bias) for group in groups for state in group.states if state.bias is not None
        }
        for group in groups:
            if id(group) not in waiting:
                yield from self._first_pass(group)

    def _first_pass(self, group: Group) -> list[Task]:
        group.left_to_reduce = len(group.chunks)
        return [functools.partial(self._first, group, i) for i in range(len(group.chunks))]

    def _first(self, group: Group, index: int) -> list[Task]:
        """Read a chunk; write what can be written, reduce what needs a statistic first."""
        shared = len(group.states) > 1
        logical = reading_once(self.logical) if shared else self.logical
        chunk = ChunkRows(logical, group.states[0].step, group.chunks[index])
        more: list[Task] = []
        for state in group.states:
            if state.is_two_pass:
                reduce_chunk(state, index, chunk)
                self._advance(state, index)
            else:
                more += self._write(state, index, chunk)
        if not group.two_pass:
            return more
        if group.holds:
            group.held[index] = logical
        with group.lock:
            group.left_to_reduce -= 1
            if group.left_to_reduce:
                return more
        for state in group.two_pass:
            state.stats = statistic_of(state)
        more += [functools.partial(self._second, group, i) for i in range(len(group.chunks))]
        return more

    def _second(self, group: Group, index: int) -> list[Task]:
        """Write what waited for a statistic, from rows that were held or are read again."""
        logical = group.held.pop(index, self.logical)
        chunk = ChunkRows(logical, group.states[0].step, group.chunks[index])
        more: list[Task] = []
        for state in group.two_pass:
            more += self._write(state, index, chunk)
        return more

    def _write(self, state: StepState, index: int, chunk: ChunkRows) -> list[Task]:
        write_chunk(state, index, chunk, check=self.check, hashes=self.hashes, cards=self.cards)
        self._advance(state, index)
        with state.lock:
            state.left_to_write -= 1
            if state.left_to_write:
                return []
        result = state.finish()
        if state.output.finished is not None:
            state.output.finished(state.index, result)
        return self._bias_tasks(state)

    def _bias_tasks(self, state: StepState) -> list[Task]:
        """Writing of the bias that was waiting for this weight."""
        if state.bias is None:
            return []
        (bias,) = state.bias.states
        parts = [state.shifts[index] for index in sorted(state.shifts)]
        bias.shift = np.concatenate(parts).astype(np.float32)
        return self._first_pass(state.bias)

    def _advance(self, state: StepState, index: int) -> None:
        total, count = state.step.source_nbytes, len(state.chunks)
        done = total * (index + 1) // count - total * index // count
        self.progress.advance(done, state.step.target)
