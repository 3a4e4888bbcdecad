"""LEVELS: what of the weights is on the device at once, from everything to two layers.

none        every part stays
model       one part at a time: text encoders one by one, then the denoiser, then the decoder
blocks      of the part at work what is in no block, some blocks that stay, and two slots of the
            size of the largest other block: one computing, one arriving
sequential  of the part at work two slots of the size of its largest layer

Small parameters (norms, biases) of every part stay on the device at each level. Tables of tokens
are looked up on the host where weights are streamed. Autoencoders have no blocks: they are whole at
`blocks`, and streamed by layer at `sequential`. Added up: weights, activations, and what decoding
one packed weight takes, as if the widest weight were decoded at the widest step.

This arithmetic is the planner's (runtime/memory/plan.py) and the inspector's (inspect/fit.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from diffquant.convert.footprint.stages import Footprint, Stage
from diffquant.convert.footprint.weights import PartWeights

__all__ = [
    "CONTEXT_NBYTES",
    "DECODERS",
    "LEVELS",
    "READERS",
    "SLOTS",
    "Need",
    "block_count",
    "blocks_nbytes",
    "moment_nbytes",
    "most_blocks",
    "needs",
    "on_device",
    "others_nbytes",
    "spread",
]

SLOTS = 2  # one computing, one arriving
READERS = 4  # tensors read at once for a GPU: a thread copies 4 GB/s out of the page cache

_MIB = 1 << 20
# What a device takes before the first tensor. A GPU's context, libraries' workspaces and fragments:
# ComfyUI sets as much aside (Comfy-Org/ComfyUI@a125cd84:comfy/model_management.py,
# EXTRA_RESERVED_VRAM). On a CPU: interpreter, torch and numba with its compiled decoders, 195 MiB
# of anonymous memory (docs/lab-log.md).
CONTEXT_NBYTES: Mapping[str, int] = {"cuda": 400 * _MIB, "mps": 400 * _MIB, "cpu": 200 * _MIB}

# How the autoencoder works, the fastest first: all at once, in strips, in strips of maps that lie
# in host memory.
DECODERS = ("whole", "strips", "host")


def spread(total: int, kept: int) -> frozenset[int]:
    """Which of a part's blocks stay when so many do: evenly, so that copies overlap with work."""
    return frozenset(index * total // kept for index in range(kept)) if kept else frozenset()


def blocks_nbytes(weights: PartWeights, kept: int) -> int:
    """Bytes on the device of a part at work at level blocks, with `kept` blocks that stay."""
    if not weights.blocks:
        return weights.nbytes - weights.tables
    stay = spread(len(weights.blocks), kept)
    streamed = [size for index, size in enumerate(weights.blocks) if index not in stay]
    resident = sum(weights.blocks) - sum(streamed)
    return weights.small + weights.loose + resident + SLOTS * max(streamed, default=0)


def most_blocks(weights: PartWeights, budget: int) -> int:
    """How many blocks of a part can stay within a budget for its weights; 0 where none can."""
    total = len(weights.blocks)
    fitting = (kept for kept in range(total, 0, -1) if blocks_nbytes(weights, kept) <= budget)
    return next(fitting, 0)


def _everything(stages: Sequence[Stage], _stage: Stage) -> int:
    return sum(weights.nbytes for weights in _parts(stages).values())


def _part(stages: Sequence[Stage], stage: Stage) -> int:
    return stage.weights.nbytes + others_nbytes(stages, stage)


def _blocks(stages: Sequence[Stage], stage: Stage) -> int:
    weights = stage.weights
    least = min(blocks_nbytes(weights, 0), blocks_nbytes(weights, len(weights.blocks)))
    return least + others_nbytes(stages, stage)


def _layers(stages: Sequence[Stage], stage: Stage) -> int:
    weights = stage.weights
    slots = min(SLOTS * weights.layer.nbytes, weights.layers)
    return weights.small + slots + others_nbytes(stages, stage)


# Level -> (all stages, the one at work) -> bytes of weights on the device; the fastest first.
LEVELS: Mapping[str, Callable[[Sequence[Stage], Stage], int]] = {
    "none": _everything,
    "model": _part,
    "blocks": _blocks,
    "sequential": _layers,
}


def on_device(level: str, stages: Sequence[Stage], stage: Stage, *, kept: int | None = None) -> int:
    """Bytes of weights on the device while a stage is at work.

    Args:
        level: a key of LEVELS.
        stages: all of them.
        stage: the one at work.
        kept: blocks of its part that stay, at level blocks; None: as many as take least.
    """
    if level == "blocks" and kept is not None:
        return blocks_nbytes(stage.weights, kept) + others_nbytes(stages, stage)
    return LEVELS[level](stages, stage)


def _parts(stages: Iterable[Stage]) -> dict[str, PartWeights]:
    """Weights by part: an autoencoder that encodes and decodes counts once."""
    return {stage.part: stage.weights for stage in stages}


def others_nbytes(stages: Sequence[Stage], stage: Stage) -> int:
    """Small parameters of the parts that are not at work."""
    parts = _parts(stages).items()
    return sum(weights.small for part, weights in parts if part != stage.part)


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


def moment_nbytes(stage: Stage, decoder: str) -> int:
    """Activations of a stage on the device, with the autoencoder working in that way."""
    moment = {"whole": None, "strips": stage.tiled, "host": stage.host}[decoder]
    return (stage.activations if moment is None else moment).nbytes


def _need(found: Footprint, level: str, *, tiled: bool) -> Need:
    def total(stage: Stage) -> int:
        moment = moment_nbytes(stage, "strips" if tiled else "whole")
        return LEVELS[level](found.stages, stage) + moment + stage.scratch

    worst = max(found.stages, key=total)
    return Need(level, tiled, total(worst), worst.name, worst.title)


def block_count(found: Footprint, stage: Stage, budget: int) -> int:
    """How many blocks of a streamed part can stay on the device within a budget for the stage."""
    spare = budget - stage.activations.nbytes - stage.scratch - others_nbytes(found.stages, stage)
    return most_blocks(stage.weights, spare)
