"""Which weights of several plans are made of the same source rows, and how often these are read.

Plans of one source share a weight when the rows it is brought together from, its shape and what
adapters do to it are the same: the float32 rows are then the same, whatever each output makes of
them. `cut_alike` gives such weights common chunk borders (the least common multiple of what their
formats ask for), so that a chunk is read and decoded once and serves every output. Borders move no
byte of an output: tests compare with the outputs of single runs.

A format that must know a statistic of the whole tensor first sees every row twice. Where several
outputs share the tensor, its stored bytes are held between the two, as long as the tensors that
can be under way at once fit into HELD_NBYTES; larger ones are read a second time, and counted so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from diffquant.convert.cutting import chunks_of
from diffquant.convert.logical import LogicalSource
from diffquant.convert.plan import Plan, Step

__all__ = ["HELD_NBYTES", "Member", "cut_alike", "is_held", "rows_read", "shared_steps"]

HELD_NBYTES = 512 << 20  # stored bytes held between two passes, all workers together
Member = tuple[int, int]  # index of a plan, index of one of its steps


def shared_steps(plans: Sequence[Plan]) -> tuple[tuple[Member, ...], ...]:
    """Steps whose chunks are made of the same rows, at most one of each plan, in plan order."""
    return _alike(plans, lambda step: (_rows_of(step), chunks_of(step)))


def cut_alike(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """Give steps that share their rows common chunk borders."""
    steps = [list(plan.steps) for plan in plans]
    for group in _alike(plans, _rows_of):
        common = math.lcm(*(steps[plan][index].row_multiple for plan, index in group))
        for plan, index in group:
            if len(group) > 1:
                steps[plan][index] = replace(steps[plan][index], cut=common)
    return tuple(replace(plan, steps=tuple(cut)) for plan, cut in zip(plans, steps, strict=True))


def is_held(logical: LogicalSource, steps: Sequence[Step], workers: int) -> bool:
    """Whether the stored bytes of shared rows stay in memory until a statistic is known.

    At most one tensor more than there are workers is between its two passes: whatever follows a
    finished first pass is worked on before the next tensor is begun.
    """
    rows = steps[0].assignment
    return (
        len(steps) > 1
        and any(step.passes > 1 for step in steps)
        and not rows.axis
        and all(logical.tensors[piece.key].is_as_stored for piece in rows.pieces)
        and _source_nbytes(steps) <= HELD_NBYTES // (workers + 1)
    )


def rows_read(logical: LogicalSource, plans: Sequence[Plan], workers: int) -> int:
    """Bytes of weights that a run of these plans reads, second passes included."""
    total = 0
    for group in shared_steps(plans):
        steps = [plans[plan].steps[index] for plan, index in group]
        passes = 1 if is_held(logical, steps, workers) else max(step.passes for step in steps)
        total += _source_nbytes(steps) * passes
    return total


def _alike(
    plans: Sequence[Plan], name: Callable[[Step], Hashable]
) -> tuple[tuple[Member, ...], ...]:
    found: dict[Hashable, list[Member]] = {}
    for number, plan in enumerate(plans):
        corrected = {fix.bias for fix in plan.bias_fixes}  # they wait for their weight, each alone
        seen: Counter[Hashable] = Counter()
        for index, step in enumerate(plan.steps):
            group: Hashable = (number, index)
            if step.assignment.pieces and index not in corrected:
                rows = name(step)
                group = (rows, seen[rows])  # a plan that writes them twice has two groups
                seen[rows] += 1
            found.setdefault(group, []).append((number, index))
    return tuple(map(tuple, found.values()))


def _rows_of(step: Step) -> Hashable:
    """What float32 rows depend on; adapters are the same when they are one object."""
    return replace(step.assignment, target=""), tuple(map(id, step.adapters))


def _source_nbytes(steps: Sequence[Step]) -> int:
    return max(step.source_nbytes for step in steps)
