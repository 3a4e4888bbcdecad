"""How much memory a run needs, before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from diffquant.convert.cutting import chunks_of
from diffquant.convert.logical import LogicalSource
from diffquant.convert.plan import Plan, Step
from diffquant.convert.roundings import feedback_nbytes
from diffquant.convert.sharing import is_held, shared_steps
from diffquant.quant.formats import matrix_shape

__all__ = ["peak_nbytes", "peak_together"]

# Anonymous memory of the interpreter, numba and compiled kernels: 70 MiB measured, and some room.
# Live bytes per weight in a worker: the stored row, float32, encoded bytes and the decoded check,
# 11 measured; rows that are brought together or turned are copied more often.
_FIXED_NBYTES = 80 << 20
# What every further output adds: kernels of more formats, its plan and digests. 1.4 MiB measured
# (benchmarks/several_types.py, fourteen types).
_OUTPUT_NBYTES = 2 << 20
_BYTES_PER_WEIGHT = 16
_BYTES_PER_WHOLE_WEIGHT = 28
# Page-locked rows on their way to a card, and parts on the way back.
_BYTES_PER_STAGED_WEIGHT = 8
# Rows before and after, the change, and what it is computed from.
_BYTES_PER_ADAPTED_WEIGHT = 20
# Scales per element, candidates of every run, columns in another order (quant/rounding).
_BYTES_PER_ROUNDED_WEIGHT = 32


def peak_nbytes(plan: Plan, workers: int, *, beside: int = 0) -> int:
    """Predicted anonymous memory of the process while it runs the plan: an upper bound.

    A step that cannot be cut (a transpose, one long vector) holds its whole tensor. `beside` is
    what other work needs, before or after.
    """
    live = (_chunk_nbytes(step) + _carried_nbytes(step) for step in plan.steps)
    running = workers * max(live, default=0)
    return _FIXED_NBYTES + max(running, beside)


def peak_together(logical: LogicalSource, plans: Sequence[Plan], workers: int) -> int:
    """The same for several plans in one pass.

    A worker holds a chunk's rows and one encoding of them at a time, so that outputs hardly add up.
    What does: the state of error feedback, and stored bytes held between two passes.
    """
    live, held = 0, 0
    for group in shared_steps(plans):
        steps = [plans[plan].steps[index] for plan, index in group]
        live = max(live, max(map(_chunk_nbytes, steps)) + sum(map(_carried_nbytes, steps)))
        if is_held(logical, steps, workers):
            held = max(held, *(step.source_nbytes for step in steps))
    more = (len(plans) - 1) * _OUTPUT_NBYTES
    return _FIXED_NBYTES + workers * live + (workers + 1) * held + more


def _chunk_nbytes(step: Step) -> int:
    """What the largest chunk takes on its way through a worker."""
    shape, pieces = step.assignment.shape, step.assignment.pieces
    _, k = matrix_shape(shape)
    weights = max((stop - start) * k for start, stop in chunks_of(step))
    copied = step.assignment.transpose or step.adapters or len(shape) < 2 or len(pieces) > 1
    nbytes = weights * (_BYTES_PER_WHOLE_WEIGHT if copied else _BYTES_PER_WEIGHT)
    if step.adapters:
        nbytes += weights * _BYTES_PER_ADAPTED_WEIGHT
    if step.encoder != "cpu":
        nbytes += weights * _BYTES_PER_STAGED_WEIGHT
    return nbytes + (weights * _BYTES_PER_ROUNDED_WEIGHT if step.rounding != "nearest" else 0)


def _carried_nbytes(step: Step) -> int:
    """What error feedback keeps from a weight's first chunk to its last."""
    _, k = matrix_shape(step.assignment.shape)
    return feedback_nbytes(k) if step.rounding == "feedback" else 0
