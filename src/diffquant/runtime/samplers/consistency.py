"""LCM and TCD: for models distilled to jump to the picture and take fresh noise back.

Sources: LCM arXiv:2310.04378 algorithm 3; TCD arXiv:2402.19159 algorithm 4 (gamma is eta here);
huggingface/diffusers 0.42 schedulers/scheduling_{lcm,tcd}.py.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from diffquant.runtime.levels import Walk
from diffquant.runtime.samplers.base import Request, drawn, mixed, table_walk
from diffquant.runtime.samplers.ddim import AlphaTable

__all__ = ["Lcm", "Tcd"]


def _walk(request: Request) -> Walk:
    """The distilled timesteps, unless the caller names others."""
    if request.schedule is None:
        request = dataclasses.replace(request, schedule="lcm")
    walk = table_walk(request, "leading")
    return dataclasses.replace(walk, even=False)


class Lcm(AlphaTable):
    """Jump to the picture, then noise it to the next level."""

    def __init__(self, request: Request) -> None:
        """Plan a run."""
        facts = request.facts
        clips = bool(facts.clip_sample)
        super().__init__(facts, _walk(request), last_is_one=True, clips=clips)
        self.draw = request.draw

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Jump to the picture, then noise it to the next level."""
        t = self.timesteps[index]
        scaled = t * self.facts.timestep_scaling
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        clean = out * self.clean(output, x, t) + skip * x
        following = self.after(index)
        if following < 0:
            return clean
        return mixed(clean, drawn(self.draw, x), *self.weights(following))


class Tcd(AlphaTable):
    """Jump below the next level, then noise up to it; eta 0 jumps right to it."""

    def __init__(self, request: Request) -> None:
        """Plan a run."""
        super().__init__(request.facts, _walk(request), last_is_one=False)
        self.draw, self.eta = request.draw, request.stochasticity(0.3)

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Jump below the next level, then noise up to it."""
        t, following = self.timesteps[index], self.after(index)
        below = math.floor((1 - self.eta) * max(following, 0.0))
        a, s = self.weights(below)
        jumped = mixed(self.clean(output, x, t), self.noise(output, x, t), a, s)
        if self.eta == 0 or following < 0:
            return jumped
        ratio = self.alphas[int(following)] / self.alphas[below]
        return mixed(jumped, drawn(self.draw, x), math.sqrt(ratio), math.sqrt(1 - ratio))
