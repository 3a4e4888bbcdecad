"""What an allocation decided and why, as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AllocationReport", "CurvePoint", "FreedTensor", "PublishedType", "TensorChoice"]


@dataclass(frozen=True, slots=True)
class TensorChoice:
    """The format of one tensor, and what its neighbours would have changed.

    Attributes:
        key: canonical.
        format: as chosen.
        nbytes: in the file.
        error: predicted, of the tensor's own.
        smaller: next smaller option, "" where there is none.
        smaller_saves: bytes that it would save.
        smaller_costs: error that it would add.
        larger: next larger option that has less error, "" where there is none.
        larger_costs: bytes that it would take.
        larger_brings: error that it would take away.
    """

    key: str
    format: str
    nbytes: int
    error: float
    smaller: str = ""
    smaller_saves: int = 0
    smaller_costs: float = 0.0
    larger: str = ""
    larger_costs: int = 0
    larger_brings: float = 0.0


@dataclass(frozen=True, slots=True)
class FreedTensor:
    """A layer that types keep, and that was chosen for.

    Attributes:
        key: canonical.
        format: as chosen; `kept_as` where keeping it was the better choice.
        kept_as: what types store it as.
        reason: why they do.
        saves_nbytes: against keeping it.
    """

    key: str
    format: str
    kept_as: str
    reason: str
    saves_nbytes: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A budget and the least error at it; `nbytes` in the unit that was asked for."""

    nbytes: int
    error: float


@dataclass(frozen=True, slots=True)
class PublishedType:
    """A named type beside the mix of its size.

    Attributes:
        type: TYPES name.
        nbytes: it takes, in the unit that was asked for.
        error: predicted; None where a format of it was not measured.
        allocated: predicted error of the best mix whose tensors take no more bytes than its own;
            None where none does.
    """

    type: str
    nbytes: int
    error: float | None
    allocated: float | None


@dataclass(frozen=True, slots=True)
class AllocationReport:
    """What was asked for, what was chosen, and what else could have been.

    Attributes:
        asked: the option, as typed.
        part: whose weights were chosen for: "denoiser", or a text encoder's name.
        counts: what the sizes below are sizes of: "file", "denoiser" (the part) or "device".
        limit_nbytes: what may be taken.
        nbytes: what is taken.
        smallest_nbytes, largest_nbytes: the range that can be asked for.
        bits_per_weight: of the part.
        among: formats to choose from.
        sensitivity: where predictions come from, in words.
        method: "outputs" or "weights".
        unit: of errors.
        error: predicted, of the choice.
        bound: no choice of this size has a smaller one.
        exact: whether the choice itself is known to be the best.
        slope: error that a further byte saves here; steps that save more were taken.
        formats: format -> share of the weights that were allocated.
        tensors: every tensor that was allocated, in file order.
        curve: from the smallest to the largest.
        published: named types, the largest first.
        freed: layers that types keep and `--free-kept` chose for, in file order.
        notes: what was assumed or left out.
    """

    asked: str
    part: str
    counts: str
    limit_nbytes: int
    nbytes: int
    smallest_nbytes: int
    largest_nbytes: int
    bits_per_weight: float
    among: tuple[str, ...]
    sensitivity: str
    method: str
    unit: str
    error: float
    bound: float
    exact: bool
    slope: float
    formats: Mapping[str, float]
    tensors: tuple[TensorChoice, ...]
    curve: tuple[CurvePoint, ...]
    published: tuple[PublishedType, ...]
    freed: tuple[FreedTensor, ...]
    notes: tuple[str, ...] = ()
