"""What a comparison of files is asked for, and how its rows are called."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffquant.runtime.memory.budget import Asked
from diffquant.runtime.scorers import parse

__all__ = [
    "CONTROL",
    "DEFAULT_METRICS",
    "FLOOR",
    "CompareSettings",
    "default_metrics",
    "row_names",
]

DEFAULT_METRICS = ("psnr", "ssim", "flip", "ssimulacra2", "lpips")
FLOOR, CONTROL = "noise floor", "control"


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """What is drawn and judged.

    Attributes:
        prompts, seeds: every prompt with every seed.
        steps, cfg, size: cfg and size None take the model's defaults.
        sampler: as for `generate`; None takes the model's default.
        metrics: keys of METRICS, columns in this order; those of gates are added.
        limits: gates: key of GATES -> limit; none: nothing is judged but broken files.
        only: name of the part that is taken from candidates alone; None: all they have.
        base, vae: as for EngineFiles; base None: candidates take what they lack from the reference.
        engine: key of ENGINES.
        lpips_weights, clip_model: as MetricNeeds has them.
        synthetic: compare denoisers alone, as runtime/synthetic.py draws with them.
        memory: what may be taken of the device's and the host's.
        keep_pictures: return every row's pictures; else the reference's alone, and no more than
            two rows' are in memory at a time.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 12
    cfg: float | None = None
    size: tuple[int, int] | None = None
    sampler: str | None = None
    metrics: tuple[str, ...] = DEFAULT_METRICS
    limits: Mapping[str, float] = field(default_factory=dict)
    only: str | None = None
    base: Path | None = None
    vae: Path | None = None
    engine: str = "bundled"
    device: str = "cpu"
    dtype: str = "float32"
    lpips_weights: Path | None = None
    clip_model: str | None = None
    synthetic: bool = False
    keep_pictures: bool = True
    memory: Asked = field(default_factory=Asked)


def default_metrics(prompts: Sequence[str]) -> tuple[str, ...]:
    """DEFAULT_METRICS, and the prompt score where every prompt is of the demo grammar."""
    try:
        for prompt in prompts:
            parse(prompt)
    except ValueError:
        return DEFAULT_METRICS
    return (*DEFAULT_METRICS, "prompt")


def row_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """A name for each file: its base name, with as many folders as tell it from the others.

    Links keep their own names: in a hub's cache they lead to files that are called by a hash.
    """
    taken = {FLOOR, CONTROL}
    places = [Path(os.path.abspath(path)).parts for path in paths]  # noqa: PTH100 - not resolved
    names = []
    for parts in places:
        for count in range(1, len(parts) + 1):
            name = "/".join(parts[-count:])
            alike = [one for one in places if one[-count:] == parts[-count:]]
            if len(alike) == 1 and name not in taken:
                break
        names.append(name)
    return tuple(names)
