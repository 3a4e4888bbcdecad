"""Euler, Euler a and Heun over sigma = sqrt((1 - alpha) / alpha), latents clean + sigma noise.

Sources: arXiv:2206.00364 algorithm 1 without churn; the ancestral step crowsonkb/k-diffusion
k_diffusion/sampling.py (get_ancestral_step); huggingface/diffusers 0.42
schedulers/scheduling_{euler_discrete,euler_ancestral_discrete,heun_discrete}.py.
"""

from __future__ import annotations

import math

from torch import Tensor

from diffquant.runtime.levels import Walk
from diffquant.runtime.samplers.base import Request, clean_of, drawn, mixed
from diffquant.runtime.schedules import SchedulerFacts

__all__ = ["Euler", "EulerAncestral", "Heun", "OverSigmas", "ancestral", "single"]


class OverSigmas:
    """What these share: latents that grow with sigma, shown to the model at unit variance."""

    def __init__(self, facts: SchedulerFacts, walk: Walk, calls: list[tuple[float, float]]) -> None:
        """Keep (timestep, sigma) of each call, and where the run ends."""
        self.facts, self.walk = facts, walk
        self.timesteps = tuple(t for t, _ in calls)
        self.levels = (*(sigma for _, sigma in calls), walk.sigmas[-1])
        top = walk.sigmas[0]
        self.init_scale = (top**2 + 1) ** 0.5 if walk.unit else top

    def scale_input(self, x: Tensor, index: int) -> Tensor:
        """Give the model latents of unit variance."""
        return x / math.sqrt(self.levels[index] ** 2 + 1)

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """Noise clean latents to the level of call `index`."""
        return mixed(clean, noise, 1.0, self.levels[index])

    def estimate(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """The clean latents that the output at call `index` means."""
        return self.clean(output, x, self.levels[index])

    def clean(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        """The clean estimate at `sigma`."""
        if self.facts.prediction_type == "epsilon":  # in the scale of x, for its float32
            return x - sigma * output
        a = 1 / math.sqrt(sigma**2 + 1)
        return clean_of(self.facts.prediction_type, output, x * a, a, sigma * a)


def single(walk: Walk) -> list[tuple[float, float]]:
    """One call a step: its timestep and sigma."""
    return list(zip(walk.timesteps, walk.sigmas, strict=True))[:-1]


class Euler(OverSigmas):
    """Follow the line from the clean estimate down to the next sigma."""

    def __init__(self, request: Request) -> None:
        """Plan a run."""
        walk = request.walk("linspace")
        super().__init__(request.facts, walk, single(walk))

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Follow the line from the clean estimate down to the next sigma."""
        sigma, following = self.levels[index], self.levels[index + 1]
        slope = (x - self.clean(output, x, sigma)) / sigma
        return x + slope * (following - sigma)


def ancestral(sigma: float, following: float) -> tuple[float, float]:
    """Split a step in two: how far down to go, and how much fresh noise leads back up."""
    up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
    return (following**2 - up**2) ** 0.5, up


class EulerAncestral(OverSigmas):
    """Euler further down than the next sigma, then up to it with fresh noise."""

    def __init__(self, request: Request) -> None:
        """Plan a run."""
        walk = request.walk("linspace")
        super().__init__(request.facts, walk, single(walk))
        self.draw = request.draw

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Go further down than the next sigma, then up to it with fresh noise."""
        sigma, following = self.levels[index], self.levels[index + 1]
        down, up = ancestral(sigma, following)
        slope = (x - self.clean(output, x, sigma)) / sigma
        x = x + slope * (down - sigma)
        return x + up * drawn(self.draw, x) if up > 0 else x


class Heun(OverSigmas):
    """Euler, a look from where it leads, and the step again with both slopes' mean."""

    def __init__(self, request: Request) -> None:
        """Plan a run of two calls a step, the last alone where it ends at 0."""
        walk = request.walk("linspace")
        calls = single(walk)
        seen = list(zip(walk.timesteps, walk.sigmas, strict=True))
        pairs = [call for now, then in zip(calls, seen[1:], strict=True) for call in (now, then)]
        super().__init__(request.facts, walk, pairs if walk.sigmas[-1] > 0 else pairs[:-1])
        self.began: tuple[Tensor, Tensor, float] | None = None

    def clean(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        """The clean estimate at `sigma`, clipped where the checkpoint asks for it."""
        clean = super().clean(output, x, sigma)
        if self.facts.clip_sample:
            return clean.clamp(-self.facts.clip_sample_range, self.facts.clip_sample_range)
        return clean

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Try a step, then take it with the mean of the slopes at both its ends."""
        sigma = self.levels[index]
        slope = (x - self.clean(output, x, sigma)) / sigma
        if self.began is None:
            length = self.levels[index + 1] - sigma
            self.began = (x, slope, length)
            if self.levels[index + 1] == 0:
                self.began = None
            return x + slope * length
        start, first, length = self.began
        self.began = None
        return start + (first + slope) / 2 * length
