"""LEVELS: what of the weights is on the device at once, from everything to two layers.

none        every part stays
model       one part at a time: text encoders one by one, then the denoiser, then the decoder
blocks      of the part at work two blocks, one computing and one arriving, and what is no block
sequential  of the part at work two layers, one computing and one arriving

A part without a list of blocks, such as a decoder, is never streamed. At each level the decoder
may work in strips. Added up: resident weights, activations, and what decoding one packed weight
takes, as if the widest weight were decoded at the widest step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffquant.convert.footprint.picture import Footprint, Stage

__all__ = ["LEVELS", "Need", "block_count", "needs"]

_IN_FLIGHT = 2  # one computing, one arriving


def _everything(stages: Sequence[Stage], _stage: Stage) -> int:
    return sum(one.weights.nbytes for one in stages)


def _part(_stages: Sequence[Stage], stage: Stage) -> int:
    return stage.weights.nbytes


def _blocks(_stages: Sequence[Stage], stage: Stage) -> int:
    weights = stage.weights
    streamed = _IN_FLIGHT * max(weights.blocks, default=0)
    return min(weights.nbytes, weights.rest + streamed)


def _layers(_stages: Sequence[Stage], stage: Stage) -> int:
    weights = stage.weights
    if not weights.blocks:
        return weights.nbytes
    return min(weights.nbytes, max(weights.largest.nbytes, _IN_FLIGHT * weights.matrix.nbytes))


# Level -> (all stages, the one at work) -> bytes of weights on the device; the fastest first.
LEVELS: Mapping[str, Callable[[Sequence[Stage], Stage], int]] = {
    "none": _everything,
    "model": _part,
    "blocks": _blocks,
    "sequential": _layers,
}


@dataclass(frozen=True, slots=True)
class Need:
    """What one level needs.

    Attributes:
        level: a key of LEVELS.
        tiled: whether the decoder works in strips.
        nbytes: the largest stage, weights and all.
        stage, title: which one that is.
    """

    level: str
    tiled: bool
    nbytes: int
    stage: str
    title: str


def needs(found: Footprint) -> tuple[Need, ...]:
    """Each level without and with strips, in the order they should be tried.

    Strips come before a slower level: they cost a picture seconds, streaming costs every step.
    """
    return tuple(_need(found, level, tiled=tiled) for level in LEVELS for tiled in (False, True))


def _need(found: Footprint, level: str, *, tiled: bool) -> Need:
    def total(stage: Stage) -> int:
        moment = stage.tiled if tiled and stage.tiled is not None else stage.activations
        return LEVELS[level](found.stages, stage) + moment.nbytes + stage.scratch

    worst = max(found.stages, key=total)
    return Need(level, tiled, total(worst), worst.name, worst.title)


def block_count(stage: Stage, budget: int) -> int:
    """How many blocks of a streamed part can stay on the device within a budget for the stage.

    Beside the two in flight, the smallest first; all of them where all fit.
    """
    weights = stage.weights
    spare = budget - weights.rest - stage.activations.nbytes - stage.scratch
    if spare >= sum(weights.blocks):
        return len(weights.blocks)
    spare -= _IN_FLIGHT * max(weights.blocks, default=0)
    sums = itertools.accumulate(sorted(weights.blocks))
    return sum(total <= spare for total in sums)
