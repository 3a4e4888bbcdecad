"""DPM++ SDE: half a step in log sigma with fresh noise, a look, and the whole step from there.

The noise of both halves is one Brownian path over sigma, as k-diffusion draws it: two draws a step,
and the whole step's noise is made of them.
Source: arXiv:2211.01095 algorithm 1 in its stochastic form; crowsonkb/k-diffusion
k_diffusion/sampling.py (sample_dpmpp_sde); huggingface/diffusers 0.42
schedulers/scheduling_dpmsolver_sde.py.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from diffquant.runtime.samplers.base import Request, drawn
from diffquant.runtime.samplers.euler import OverSigmas, ancestral, single
from diffquant.runtime.schedules import sigma_table

__all__ = ["DpmSde"]


class DpmSde(OverSigmas):
    """Half a step in log sigma with fresh noise, a look, and the whole step from there."""

    def __init__(self, request: Request) -> None:
        """Plan a run of two calls a step, the last alone where it ends at 0."""
        walk = request.walk("linspace")
        logs = np.log(sigma_table(request.facts))
        calls: list[tuple[float, float]] = []
        for index, (t, sigma) in enumerate(single(walk)):
            calls.append((t, sigma))
            if (following := walk.sigmas[index + 1]) > 0:
                middle = (sigma * following) ** 0.5
                calls.append((float(np.interp(np.log(middle), logs, np.arange(len(logs)))), middle))
        super().__init__(request.facts, walk, calls)
        self.draw = request.draw
        self.began: tuple[Tensor, float, Tensor] | None = None

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Go half a step, or with the clean estimate seen from there the whole one."""
        sigma, following = self.levels[index], self.levels[index + 1]
        clean = self.clean(output, x, sigma)
        if following == 0:
            return clean
        fresh = drawn(self.draw, x)
        if self.began is None:
            self.began = (x, sigma, fresh)
            return self._move(x, clean, fresh, sigma, following)
        start, top, first = self.began
        self.began = None
        early, late = top - sigma, sigma - following  # the path's time is sigma
        path = (first * early**0.5 + fresh * late**0.5) / (early + late) ** 0.5
        return self._move(start, clean, path, top, following)

    @staticmethod
    def _move(x: Tensor, clean: Tensor, noise: Tensor, sigma: float, following: float) -> Tensor:
        down, up = ancestral(sigma, following)
        return down / sigma * x + (1 - down / sigma) * clean + up * noise
