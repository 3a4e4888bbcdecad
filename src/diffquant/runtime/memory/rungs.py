"""Rungs: ways to place a pipeline's weights, from everything on the device to two layers.

A rung is a level of offloading (convert/footprint/levels.py), a way for the autoencoder to work,
and at level blocks how many blocks of each part stay. `candidates` lists them from the fastest;
`ladder_below` picks those that an out-of-memory error can walk down, each of which takes no more
than the one before at any stage, and less at some. No torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from diffquant.convert.footprint.levels import (
    CONTEXT_NBYTES,
    DECODERS,
    LEVELS,
    READERS,
    SLOTS,
    moment_nbytes,
    most_blocks,
    on_device,
    others_nbytes,
    spread,
)
from diffquant.convert.footprint.stages import Footprint, Stage

__all__ = [
    "DECODED_KEPT_NBYTES",
    "Rung",
    "StagePeak",
    "candidates",
    "host_nbytes",
    "ladder_below",
    "next_rung",
    "stage_peaks",
    "told",
]

_STREAMING = ("blocks", "sequential")
# A buffer for decoded weights that the CPU keeps from stage to stage: kernels/scratch.py,
# KEPT_NBYTES, repeated here because that module needs torch.
DECODED_KEPT_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to place weights.

    Attributes:
        level: none, model, blocks or sequential.
        decoder: whole, strips or host: how the autoencoder works.
        pinned: whether streamed weights wait in page-locked host memory, else in their file.
        resident: part -> blocks that stay on the device while it is at work, at level blocks;
            which ones: convert/footprint/levels.py, `spread`.
    """

    level: str
    decoder: str
    pinned: bool
    resident: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StagePeak:
    """What one stage takes on the device, in bytes, the device's own context aside."""

    stage: str
    part: str
    title: str
    weights: int
    activations: int
    scratch: int

    @property
    def total(self) -> int:
        """All three."""
        return self.weights + self.activations + self.scratch


def stage_peaks(found: Footprint, rung: Rung, *, device: str) -> tuple[StagePeak, ...]:
    """What each stage takes on the device, in the order they run."""
    widest = max(stage.scratch for stage in found.stages)
    kept = min(widest, DECODED_KEPT_NBYTES) if device == "cpu" else 0
    return tuple(
        StagePeak(
            stage.name,
            stage.part,
            stage.title,
            on_device(rung.level, found.stages, stage, kept=rung.resident.get(stage.part, 0))
            + _being_read(stage, rung.level, device),
            moment_nbytes(stage, rung.decoder),
            max(stage.scratch, kept),
        )
        for stage in found.stages
    )


def host_nbytes(found: Footprint, rung: Rung, *, device: str) -> int:
    """Host memory that placing takes beside a device of its own: 0 on the CPU.

    Parts stream one at a time. Page-locked memory holds all that a part streams; without, two
    buffers of its largest group carry it. A few layers are being read, and maps of an autoencoder
    that works from host memory lie there.
    """
    if device == "cpu":
        return 0
    return max(_host(stage, rung) for stage in found.stages)


def candidates(
    found: Footprint, limit: int | None, *, device: str, context: int | None = None
) -> Iterator[Rung]:
    """All rungs, the fastest first.

    Ways to decode before levels: strips cost a picture seconds, streaming costs every step.

    Args:
        found: of the picture.
        limit: bytes of the device, context included, which says how many blocks stay; None: all.
        device: cpu, cuda or mps.
        context: bytes the device takes for itself; None: the usual.
    """
    own = CONTEXT_NBYTES[device] if context is None else context
    decoders = [one for one in DECODERS if _works(found, one, device)]
    for level in LEVELS:
        waits = (True, False) if level in _STREAMING and device == "cuda" else (False,)
        for resident in _residents(found, limit, device, own) if level == "blocks" else ({},):
            for decoder, pinned in itertools.product(decoders, waits):
                yield Rung(level, decoder, pinned, resident)


def ladder_below(found: Footprint, rung: Rung, rest: Sequence[Rung], *, device: str) -> list[Rung]:
    """Of slower rungs those that help where memory runs out at `rung` after all, in order."""
    kept: list[Rung] = []
    least = [one.total for one in stage_peaks(found, rung, device=device)]
    for one in rest:
        totals = [peak.total for peak in stage_peaks(found, one, device=device)]
        if totals != least and all(a <= b for a, b in zip(totals, least, strict=True)):
            kept.append(one)
            least = totals
    return kept


def next_rung(
    rung: Rung, below: Sequence[Rung], *, autoencoder: bool
) -> tuple[Rung, tuple[Rung, ...]] | None:
    """Where to go when memory ran out, and what is then below; None: nothing helps.

    Args:
        rung: where it ran out.
        below: the ladder from there.
        autoencoder: whether it was at work. Else other ways to decode are passed over, and the
            present one is kept.
    """
    for index, one in enumerate(below):
        if autoencoder:
            return one, tuple(below[index + 1 :])
        if (one.level, one.resident) != (rung.level, rung.resident):
            return replace(one, decoder=rung.decoder), tuple(below[index:])
    return None


_WORDS = {"whole": "", "strips": ", decoding in strips", "host": ", decoding through host memory"}


def told(rung: Rung) -> str:
    """A rung in words."""
    return f"offload {rung.level}{_WORDS[rung.decoder]}"


def _works(found: Footprint, decoder: str, device: str) -> bool:
    """Whether a way to decode is another one here."""
    if decoder == "whole":
        return True
    if decoder == "strips":
        return any(stage.tiled is not None for stage in found.stages)
    return device == "cuda" and any(stage.host is not None for stage in found.stages)


def _residents(
    found: Footprint, limit: int | None, device: str, context: int
) -> Iterator[Mapping[str, int]]:
    """Blocks that stay: as many as fit, then half as many each time, then none."""
    most = {stage.part: _most(found, stage, limit, device, context) for stage in found.stages}
    most = {part: kept for part, kept in most.items() if kept}
    yield most
    while most:
        most = {part: kept // 2 for part, kept in most.items() if kept > 1}
        yield most


def _most(found: Footprint, stage: Stage, limit: int | None, device: str, context: int) -> int:
    if limit is None:
        return len(stage.weights.blocks)
    rung = Rung("blocks", "whole", pinned=False)
    peaks = stage_peaks(found, rung, device=device)
    at = next(peak for peak in peaks if peak.part == stage.part and peak.stage == stage.name)
    taken = at.activations + at.scratch + others_nbytes(found.stages, stage)
    taken += context + _being_read(stage, "blocks", device)
    return most_blocks(stage.weights, limit - taken)


def _being_read(stage: Stage, level: str, device: str) -> int:
    """On the CPU a tensor on its way from the file into a slot is a copy in the same memory."""
    if device != "cpu" or level not in _STREAMING:
        return 0
    if level == "blocks" and not stage.weights.blocks:
        return 0
    return stage.weights.layer.nbytes


def _host(stage: Stage, rung: Rung) -> int:
    weights = stage.weights
    read = max(READERS * weights.layer.nbytes, weights.tables)
    maps = stage.activations.nbytes if rung.decoder == "host" and stage.host is not None else 0
    streamed: tuple[int, ...] = ()
    if rung.level == "sequential":
        streamed = (weights.layers,) if rung.pinned else (weights.layer.nbytes,) * SLOTS
    elif rung.level == "blocks" and weights.blocks:
        stay = spread(len(weights.blocks), rung.resident.get(stage.part, 0))
        moved = [size for index, size in enumerate(weights.blocks) if index not in stay]
        streamed = tuple(moved) if rung.pinned else (max(moved, default=0),) * SLOTS
    return read + maps + sum(streamed)
