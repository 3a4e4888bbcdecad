"""Every prompt with every seed through one opened model: pictures, last latents, seconds.

A picture that came to nothing (latents that are not finite) is drawn as one of NaN, and told: a
comparison has a row for every file, broken ones too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import VerificationError
from diffquant.core.progress import Progress
from diffquant.runtime.comparison import PairValues, Value
from diffquant.runtime.engines import Side
from diffquant.runtime.judges import defects
from diffquant.runtime.metrics import Opened
from diffquant.runtime.metrics.values import value_of
from diffquant.runtime.request import PictureRequest

__all__ = ["Drawn", "Picture", "Shots", "compare_drawn", "draw_all", "latent_error"]

Picture: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Shots:
    """What is drawn by every model alike; `size` is (width, height)."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    cfg: float | None
    size: tuple[int, int]
    sampler: str | None = None

    @property
    def pairs(self) -> tuple[tuple[str, int], ...]:
        """(prompt, seed), prompts outermost."""
        return tuple((prompt, seed) for prompt in self.prompts for seed in self.seeds)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a model drew.

    Attributes:
        pictures: (H, W, 3) in [0, 1], one per pair; NaN all over where there is none.
        latents: the last ones, as the engine holds them; None where it does not tell.
        seconds: per picture, median; the first one warms up and counts only where it is alone.
        failures: why a picture is none, "" for those that are.
    """

    pictures: tuple[Picture, ...]
    latents: tuple[Picture | None, ...]
    seconds: float
    failures: tuple[str, ...]


def draw_all(side: Side, shots: Shots, label: str, progress: Progress) -> Drawn:
    """Draw every pair."""
    width, height = shots.size
    pictures: list[Picture] = []
    latents: list[Picture | None] = []
    seconds: list[float] = []
    failures: list[str] = []
    progress.start(label, len(shots.pairs) * shots.steps, "step")
    for prompt, seed in shots.pairs:
        request = PictureRequest(
            prompt,
            seed=seed,
            steps=shots.steps,
            cfg=shots.cfg,
            sampler=shots.sampler,
            width=width,
            height=height,
        )
        last: list[Picture] = []
        started = time.perf_counter()
        try:
            made = side.draw(request, lambda _done, _total: progress.advance(1), last.append)
            pictures.append(made[0])
            failures.append("")
        except VerificationError as error:
            pictures.append(np.full((height, width, 3), np.nan, np.float32))
            failures.append(str(error))
        seconds.append(time.perf_counter() - started)
        latents.append(last[-1] if last and not failures[-1] else None)
    progress.stop()
    warm = seconds[1:] or seconds
    return Drawn(tuple(pictures), tuple(latents), statistics.median(warm), tuple(failures))


def compare_drawn(
    exact: Drawn, other: Drawn, shots: Shots, judges: Opened
) -> tuple[Mapping[str, Value], tuple[PairValues, ...]]:
    """Every metric over all pairs, and of each pair."""
    pairs = []
    rows = zip(shots.pairs, exact.pictures, other.pictures, other.failures, strict=True)
    for (prompt, seed), one, two, failure in rows:
        found = (*defects(two), *((failure,) if failure else ()))
        pairs.append(PairValues(prompt, seed, judges.judge(one, two, prompt), found))
    values = {name: value_of(name, [pair.values[name] for pair in pairs]) for name in judges.judges}
    return values, tuple(pairs)


def latent_error(exact: Drawn, other: Drawn) -> float | None:
    """Relative RMSE of the last latents of all pairs; None where some are not told."""
    noise = signal = 0.0
    for one, two in zip(exact.latents, other.latents, strict=True):
        if one is None or two is None or one.shape != two.shape:
            return None
        noise += float(((one.astype(np.float64) - two) ** 2).sum())
        signal += float((one.astype(np.float64) ** 2).sum())
    return float(np.sqrt(noise / signal)) if signal > 0 else None
