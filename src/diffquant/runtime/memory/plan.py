"""plan_memory(): which rung a budget allows, what it will take, and what is below it.

Pure arithmetic on a Footprint, before a byte moves and without torch. Rungs are tried from the
fastest; the first whose stages all fit is taken. A level that was asked for is kept or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from diffquant.convert.footprint.levels import CONTEXT_NBYTES, DECODERS, LEVELS
from diffquant.convert.footprint.stages import Footprint
from diffquant.core.errors import PlanMismatch, ResourceError, UsageError
from diffquant.runtime.memory.rungs import (
    Rung,
    StagePeak,
    candidates,
    host_nbytes,
    ladder_below,
    stage_peaks,
    told,
)

__all__ = ["Budget", "MemoryPlan", "Rung", "StagePeak", "plan_memory"]

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory that may be taken.

    Attributes:
        device: bytes of the device, what it takes for itself included; None: no limit is known.
            On the CPU that is memory of the process, like `ram`: the smaller of both counts.
        ram: bytes of host memory for weights that wait and maps of the autoencoder.
        context: bytes the device takes for itself, where that was measured; None: the usual.
    """

    device: int | None = None
    ram: int | None = None
    context: int | None = None

    def own(self, device: str) -> int:
        """What the device takes for itself."""
        return CONTEXT_NBYTES[device] if self.context is None else self.context


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A rung and why.

    Attributes:
        peaks: what each stage takes, in the order they run.
        peak_nbytes: the largest of them, the device's own context included.
        host_nbytes: page-locked memory or staging buffers, and maps that lie in host memory.
        fits: whether both are within the budget.
        why: what decides, and what was turned down by how much.
        ladder: the rungs below, in the order an out-of-memory error walks them; see `next_rung`.
    """

    rung: Rung
    peaks: tuple[StagePeak, ...]
    peak_nbytes: int
    host_nbytes: int
    budget: Budget
    fits: bool
    why: tuple[str, ...]
    ladder: tuple[Rung, ...]


@dataclass(frozen=True, slots=True)
class _Weighed:
    """A rung, what it takes, and by how much that is too much."""

    rung: Rung
    peaks: tuple[StagePeak, ...]
    peak: int
    host: int
    over: int
    over_host: int

    @property
    def fits(self) -> bool:
        return self.over <= 0 and self.over_host <= 0

    @property
    def worst(self) -> StagePeak:
        return max(self.peaks, key=lambda one: one.total)


def plan_memory(
    found: Footprint,
    budget: Budget,
    *,
    device: str,
    level: str = "auto",
    decoder: str = "auto",
) -> MemoryPlan:
    """Choose the fastest rung that fits.

    Args:
        found: what the picture takes.
        budget: what there is.
        device: cpu, cuda or mps.
        level: a level that is wanted and no other, or auto.
        decoder: a way to decode that is wanted and no other, or auto.

    Raises:
        UsageError: no such level, device or way to decode.
        ResourceError: nothing fits, or what was asked for does not; the message says what would.
    """
    _check(level, ("auto", *LEVELS), "a level of offloading")
    _check(decoder, ("auto", *DECODERS), "a way to decode")
    _check(device, tuple(CONTEXT_NBYTES), "a device")
    if not found.stages:
        raise PlanMismatch("a footprint without stages cannot be planned")
    given = (budget.device, budget.ram if device == "cpu" else None)
    limit = min((one for one in given if one is not None), default=None)
    every = [
        _weigh(found, rung, budget, limit, device)
        for rung in candidates(found, limit, device=device, context=budget.own(device))
    ]
    tried = [
        one
        for one in every
        if level in ("auto", one.rung.level) and decoder in ("auto", one.rung.decoder)
    ]
    chosen = next((one for one in tried if one.fits), None)
    if chosen is None:
        raise ResourceError(_refusal(every, tried, level, decoder, device))
    slower = [one.rung for one in tried[tried.index(chosen) + 1 :] if one.over_host <= 0]
    return MemoryPlan(
        rung=chosen.rung,
        peaks=chosen.peaks,
        peak_nbytes=chosen.peak,
        host_nbytes=chosen.host,
        budget=budget,
        fits=chosen.fits,
        why=tuple(_why(found, tried, chosen, limit, device)),
        ladder=tuple(ladder_below(found, chosen.rung, slower, device=device)),
    )


def _check(given: str, known: tuple[str, ...], what: str) -> None:
    if given not in known:
        raise UsageError(f"{given!r} is not {what} (known: {', '.join(known)})")


def _weigh(
    found: Footprint, rung: Rung, budget: Budget, limit: int | None, device: str
) -> _Weighed:
    peaks = stage_peaks(found, rung, device=device)
    peak = max(one.total for one in peaks) + budget.own(device)
    host = host_nbytes(found, rung, device=device)
    over = 0 if limit is None else max(peak - limit, 0)
    over_host = 0
    if budget.ram is not None and device != "cpu":
        over_host = max(host - budget.ram, 0)
    return _Weighed(rung, peaks, peak, host, over, over_host)


def _why(
    found: Footprint,
    tried: Sequence[_Weighed],
    chosen: _Weighed,
    limit: int | None,
    device: str,
) -> Iterator[str]:
    """What was turned down, level by level at its best; then what was taken."""
    faster = tried[: tried.index(chosen)]
    for level in dict.fromkeys(one.rung.level for one in faster):
        at = [one for one in faster if one.rung.level == level]
        if level != chosen.rung.level:
            yield _turned_down(min(at, key=lambda one: (one.over, one.over_host)))
        elif at[0].rung.decoder != chosen.rung.decoder:
            yield _turned_down(at[0])
    worst = chosen.worst
    room = "" if limit is None else f" of {_gib(limit)}"
    yield (
        f"{told(chosen.rung)}: {_gib(chosen.peak)}{room} on {device}, decided by {_stage(worst)}"
    )
    for part, kept in chosen.rung.resident.items():
        total = next(len(one.weights.blocks) for one in found.stages if one.part == part)
        yield f"{part}: {kept} of {total} blocks stay while it is at work"
    if chosen.host:
        how = "page-locked memory" if chosen.rung.pinned else "buffers"
        yield f"{_gib(chosen.host)} of host memory for {how} and what is being read"


def _turned_down(one: _Weighed) -> str:
    where = f"{_gib(one.over)} too much" if one.over else f"{_gib(one.over_host)} too much RAM"
    needed = one.peak if one.over else one.host
    return f"{told(one.rung)} needs {_gib(needed)}, {where} (decided by {_stage(one.worst)})"


def _refusal(
    every: Sequence[_Weighed], tried: Sequence[_Weighed], level: str, decoder: str, device: str
) -> str:
    """Why nothing that was allowed fits, and what would."""
    if not tried:
        return f"nothing here decodes in the way {decoder!r} on {device}: use --decode auto"
    least = min(tried, key=lambda one: (one.over + one.over_host, one.peak))
    other = next((one for one in every if one.fits), None)
    if other is not None:
        asked = told(least.rung) if level != "auto" else f"decoding {decoder}"
        return (
            f"{asked}: {_turned_down(least)}; what fits is {told(other.rung)}, "
            f"which needs {_gib(other.peak)}"
        )
    return (
        f"no way to place the weights fits on {device}: {_turned_down(least)}: use a smaller type "
        "or make a smaller picture"
    )


def _stage(peak: StagePeak) -> str:
    """A stage and what is largest in it."""
    parts = {
        "weights": peak.weights,
        "activations": peak.activations,
        "one weight being decoded": peak.scratch,
    }
    largest = max(parts, key=lambda name: parts[name])
    return f"{peak.stage} with {peak.title}: {largest} {_gib(parts[largest])}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / _GIB:.2f} GiB"
