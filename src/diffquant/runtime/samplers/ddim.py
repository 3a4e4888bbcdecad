"""DDIM, with or without fresh noise.

Source: arXiv:2010.02502 equations 12 and 16; huggingface/diffusers 0.42
schedulers/scheduling_ddim.py for spacing and the levels at both ends.
"""

from __future__ import annotations

import math

from torch import Tensor

from diffquant.runtime.levels import Walk
from diffquant.runtime.samplers.base import Request, clean_of, drawn, mixed, noise_of, table_walk
from diffquant.runtime.schedules import SchedulerFacts, alphas_cumprod

__all__ = ["AlphaTable", "Ddim"]


class AlphaTable:
    """What DDIM, PNDM, LCM and TCD share: latents of unit variance, and levels by timestep."""

    init_scale = 1.0

    def __init__(
        self, facts: SchedulerFacts, walk: Walk, *, last_is_one: bool, clips: bool = False
    ) -> None:
        """Keep the table, the level below its first entry, and whether estimates are clipped."""
        self.facts, self.walk, self.clips = facts, walk, clips
        self.timesteps: tuple[float, ...] = walk.timesteps[:-1]
        alphas = alphas_cumprod(facts)
        self.alphas: list[float] = alphas.tolist()
        roots, noise = (alphas**0.5).tolist(), ((1 - alphas) ** 0.5).tolist()
        self.roots: list[tuple[float, float]] = list(zip(roots, noise, strict=True))
        self.last = (1.0, 0.0) if last_is_one else self.roots[0]
        self.stride = facts.num_train_timesteps // walk.total

    def weights(self, t: float) -> tuple[float, float]:
        """Weights of clean latents and noise at timestep `t`; below 0 lies the last level."""
        return self.roots[int(t)] if t >= 0 else self.last

    def after(self, index: int) -> float:
        """The timestep that call `index` leads to, -1 at the end of the whole run."""
        if self.walk.even:
            return self.timesteps[index] - self.stride
        ending = self.walk.offset + index + 1 == self.walk.total
        return -1.0 if ending else self.walk.timesteps[index + 1]

    def scale_input(self, x: Tensor, index: int) -> Tensor:
        """Show the latents as they are."""
        return x

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """Noise clean latents to the level of call `index`."""
        past = index == len(self.timesteps)
        t = self.after(index - 1) if past else self.timesteps[index]
        return mixed(clean, noise, *self.weights(t))

    def estimate(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """The clean latents that the output at call `index` means."""
        return self.clean(output, x, self.timesteps[index])

    def clean(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """The clean estimate at timestep `t`, clipped where the checkpoint asks for it."""
        clean = clean_of(self.facts.prediction_type, output, x, *self.weights(t))
        if self.clips:
            return clean.clamp(-self.facts.clip_sample_range, self.facts.clip_sample_range)
        return clean

    def noise(self, output: Tensor, x: Tensor, t: float) -> Tensor:
        """The noise estimate at timestep `t`."""
        return noise_of(self.facts.prediction_type, output, x, *self.weights(t))


class Ddim(AlphaTable):
    """Estimate the clean latents, then noise them to the next level; eta 0 reuses the noise."""

    def __init__(self, request: Request) -> None:
        """Plan a run."""
        facts = request.facts
        walk = table_walk(request, "leading")
        super().__init__(
            facts,
            walk,
            last_is_one=facts.set_alpha_to_one is not False,
            clips=facts.clip_sample is not False,  # a silent config clips, as its class does
        )
        self.eta, self.draw = request.stochasticity(0.0), request.draw

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Estimate the clean latents, then noise them to the next level."""
        t = self.timesteps[index]
        clean, noise = self.clean(output, x, t), self.noise(output, x, t)
        a, s = self.weights(self.after(index))
        if self.eta == 0:
            return mixed(clean, noise, a, s)
        now, _ = self.weights(t)
        fresh = self.eta * math.sqrt(s**2 / (1 - now**2) * (1 - now**2 / a**2))
        kept = mixed(clean, noise, a, math.sqrt(s**2 - fresh**2))
        return kept + fresh * drawn(self.draw, x)
