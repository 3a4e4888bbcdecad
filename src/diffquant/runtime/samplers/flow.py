"""Samplers of flows (Flux, SD3, Qwen-Image): Euler, Heun, DPM++ 2M, UniPC and their stochastic kin.

Source: arXiv:2403.03206; huggingface/diffusers 0.42
schedulers/scheduling_flow_match_{euler,heun}_discrete.py, scheduling_ltx_euler_ancestral_rf.py,
scheduling_flow_match_lcm.py, and the flow sigmas of scheduling_{dpmsolver,unipc}_multistep.py.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor

from diffquant.runtime.levels import Walk
from diffquant.runtime.samplers.base import Request, drawn, mixed
from diffquant.runtime.samplers.dpm import Dpm2M, flow_weights
from diffquant.runtime.samplers.unipc import UniPc
from diffquant.runtime.walks import flow_walk

__all__ = [
    "FlowEuler",
    "FlowEulerAncestral",
    "FlowHeun",
    "FlowLcm",
    "flow_dpmpp_2m",
    "flow_dpmpp_2m_sde",
    "flow_unipc",
]


def _walk(request: Request) -> Walk:
    whole = flow_walk(request.facts, request.steps, request.schedule, tokens=request.tokens)
    return whole.part(request.part, request.facts.num_train_timesteps)


class FlowEuler:
    """Follow the velocity from noise, time 1, to the picture, time 0."""

    init_scale = 1.0

    def __init__(self, request: Request) -> None:
        """Plan a run."""
        walk = _walk(request)
        self.levels, self.timesteps = walk.sigmas, walk.timesteps[:-1]

    def scale_input(self, x: Tensor, index: int) -> Tensor:
        """Show the latents as they are."""
        return x

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """Noise clean latents to the flow time of call `index`."""
        return mixed(clean, noise, 1.0 - self.levels[index], self.levels[index])

    def estimate(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """The clean latents that the output at call `index` means."""
        return x - self.levels[index] * output

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Follow the velocity to the next flow time."""
        return x + (self.levels[index + 1] - self.levels[index]) * output


class FlowHeun(FlowEuler):
    """Euler, a look from where it leads, and the step again with both velocities' mean."""

    def __init__(self, request: Request) -> None:
        """Plan a run of two calls a step, the last alone where it ends at 0."""
        walk = _walk(request)
        seen = list(zip(walk.timesteps, walk.sigmas, strict=True))
        pairs = [call for pair in itertools.pairwise(seen) for call in pair]
        calls = pairs if walk.sigmas[-1] > 0 else pairs[:-1]
        self.timesteps = tuple(t for t, _ in calls)
        self.levels = (*(sigma for _, sigma in calls), walk.sigmas[-1])
        self.began: tuple[Tensor, Tensor, float] | None = None

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Try a step, then take it with the mean of the velocities at both its ends."""
        if self.began is None:
            length = self.levels[index + 1] - self.levels[index]
            self.began = (x, output, length) if self.levels[index + 1] > 0 else None
            return x + length * output
        (start, first, length), self.began = self.began, None
        return start + length * (first + output) / 2


class FlowEulerAncestral(FlowEuler):
    """Follow the velocity below the next time, then go back up to it with fresh noise.

    Going up, the picture's weight shrinks from 1 - down to 1 - following; what the noise then lacks
    is drawn.
    """

    def __init__(self, request: Request) -> None:
        """Plan a run; eta 0 is Euler."""
        super().__init__(request)
        self.draw, self.eta = request.draw, request.stochasticity(1.0)

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Follow the velocity below the next time, then go back up to it with fresh noise."""
        now, following = self.levels[index], self.levels[index + 1]
        down = following * (1 + (following / now - 1) * self.eta)
        x = x + (down - now) * output
        if following == 0 or self.eta == 0:
            return x
        shrunk = (1 - following) / (1 - down)
        up = math.sqrt(max(following**2 - (down * shrunk) ** 2, 0.0))
        return mixed(x, drawn(self.draw, x), shrunk, up)


class FlowLcm(FlowEuler):
    """Jump to the picture, then noise it to the next flow time."""

    def __init__(self, request: Request) -> None:
        """Plan a run."""
        super().__init__(request)
        self.draw = request.draw

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Jump to the picture, then noise it to the next flow time."""
        clean = self.estimate(output, x, index)
        following = self.levels[index + 1]
        return mixed(clean, drawn(self.draw, x), 1 - following, following) if following else clean


def flow_dpmpp_2m(request: Request) -> Dpm2M:
    """DPM++ 2M for flows."""
    return Dpm2M(request, _walk(request), "flow_prediction", flow_weights)


def flow_dpmpp_2m_sde(request: Request) -> Dpm2M:
    """DPM++ 2M SDE for flows."""
    run = flow_dpmpp_2m(request)
    run.draw = lambda x: drawn(request.draw, x)
    return run


def flow_unipc(request: Request) -> UniPc:
    """UniPC for flows."""
    return UniPc(request, _walk(request), "flow_prediction", flow_weights)
