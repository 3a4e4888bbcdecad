"""Samplers: from noise to latents, one model call per timestep.

A sampler is made for one run. The loop is always the same::

    x = noise * sampler.init_scale
    for index, t in enumerate(sampler.timesteps):
        x = sampler.step(model(sampler.scale_input(x, index), t), x, index)

Latents stay float32 whatever the model computes in. Samplers that take the epsilon prediction also
take v-prediction; both are turned into the noise they imply.
Sources: DDIM arXiv:2010.02502 eq. 12; PNDM arXiv:2202.09778 (linear multistep, without the
Runge-Kutta warm-up); Euler arXiv:2206.00364 algorithm 1 without churn; flow matching
arXiv:2403.03206.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffquant.core.errors import ArchitectureError, UnknownFormat, UsageError
from diffquant.runtime.schedules import (
    SchedulerFacts,
    alphas_cumprod,
    flow_sigmas,
    karras_sigmas,
    timesteps,
)

__all__ = ["SAMPLERS", "Sampler", "SamplerRow", "default_sampler", "make_sampler"]


class Sampler(Protocol):
    """One run of a sampler."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the model is told at each call: training timesteps, or 1000 times the flow time."""
        ...

    @property
    def init_scale(self) -> float:
        """Standard deviation of the first latents."""
        ...

    def scale_input(self, x: Tensor, index: int) -> Tensor:
        """What the model is shown at call `index`."""
        ...

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """The next latents, from the model's output at call `index`."""
        ...


def _noise(
    facts: SchedulerFacts, output: Tensor, x: Tensor, clean_weight: float, noise_weight: float
) -> Tensor:
    """The noise that a model output means, where x = clean_weight clean + noise_weight noise."""
    match facts.prediction_type:
        case "epsilon":
            return output
        case "v_prediction":
            velocity: Tensor = output * clean_weight + x * noise_weight
            return velocity
        case other:
            known = "epsilon, v_prediction"
            raise ArchitectureError(f"prediction type {other!r} is not supported (known: {known})")


class _OverAlphas:
    """What DDIM and PNDM share: unscaled latents, and a table of alphas."""

    init_scale = 1.0

    def __init__(self, facts: SchedulerFacts, steps: int, *, last_is_one: bool) -> None:
        self.facts = facts
        self.alphas = alphas_cumprod(facts)
        self.stride = facts.num_train_timesteps // steps
        self.last = torch.ones(()) if last_is_one else self.alphas[0]

    def scale_input(self, x: Tensor, index: int) -> Tensor:
        """Show the latents as they are."""
        return x

    def alpha(self, t: int) -> Tensor:
        """Squared weight of the clean latents at timestep `t`; below 0 lies the last level."""
        return self.alphas[t] if t >= 0 else self.last

    def weights(self, t: int) -> tuple[float, float]:
        """Weights of clean latents and noise at timestep `t`, in float32 as the table is."""
        alpha = self.alpha(t)
        return float(alpha**0.5), float((1 - alpha) ** 0.5)


class Ddim(_OverAlphas):
    """Deterministic DDIM."""

    def __init__(self, facts: SchedulerFacts, steps: int, tokens: int) -> None:
        """Plan a run; `tokens` is of no concern here."""
        super().__init__(facts, steps, last_is_one=facts.set_alpha_to_one is not False)
        spaced = timesteps(facts, steps, facts.timestep_spacing or "leading")
        self.timesteps = tuple(float(t) for t in np.round(spaced))

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Estimate the clean latents, then noise them to the next level."""
        t = int(self.timesteps[index])
        clean_weight, noise_weight = self.weights(t)
        noise = _noise(self.facts, output, x, clean_weight, noise_weight)
        clean = (x - noise_weight * noise) / clean_weight
        if self.facts.clip_sample is not False:
            clean = clean.clamp(-self.facts.clip_sample_range, self.facts.clip_sample_range)
        clean_weight, noise_weight = self.weights(t - self.stride)
        following: Tensor = clean_weight * clean + noise_weight * noise
        return following


class Pndm(_OverAlphas):
    """Linear multistep over the last four outputs; the second timestep is visited twice."""

    def __init__(self, facts: SchedulerFacts, steps: int, tokens: int) -> None:
        """Plan a run of `steps` + 1 model calls; `tokens` is of no concern here."""
        super().__init__(facts, steps, last_is_one=facts.set_alpha_to_one is True)
        spaced = [
            float(t) for t in np.round(timesteps(facts, steps, facts.timestep_spacing or "leading"))
        ]
        self.timesteps = (*spaced[:2], *spaced[1:])
        self.outputs: list[Tensor] = []
        self.first: Tensor | None = None

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Blend the outputs so far and move."""
        t = int(self.timesteps[index])
        if index == 1:  # correct the first step with what was seen at its end, from where it began
            assert self.first is not None
            blend, x = (output + self.outputs[-1]) / 2, self.first
            return self._move(blend, x, t + self.stride, t)
        self.outputs = [*self.outputs[-3:], output]
        match self.outputs:
            case [a]:
                blend, self.first = a, x
            case [b, a]:
                blend = (3 * a - b) / 2
            case [c, b, a]:
                blend = (23 * a - 16 * b + 5 * c) / 12
            case [d, c, b, a]:
                blend = (55 * a - 59 * b + 37 * c - 9 * d) / 24
            case _:
                raise AssertionError("at most four outputs are kept")
        return self._move(blend, x, t, t - self.stride)

    def _move(self, output: Tensor, x: Tensor, t: int, following: int) -> Tensor:
        now, then = self.alpha(t), self.alpha(following)
        implied = _noise(self.facts, output, x, *self.weights(t))
        slope = now * (1 - then) ** 0.5 + (now * (1 - now) * then) ** 0.5
        kept: Tensor = float((then / now) ** 0.5) * x
        return kept - float(then - now) * implied / float(slope)


class Euler:
    """Euler steps over sigma = sqrt((1 - alpha) / alpha), latents scaled to clean + sigma noise."""

    def __init__(self, facts: SchedulerFacts, steps: int, tokens: int) -> None:
        """Plan a run; `tokens` is of no concern here."""
        self.facts = facts
        spacing = facts.timestep_spacing or "linspace"
        picked = timesteps(facts, steps, spacing)
        alphas = alphas_cumprod(facts)
        levels = (((1 - alphas) / alphas) ** 0.5).numpy()
        indices = np.arange(len(levels))
        sigmas = np.interp(picked, indices, levels)
        if facts.use_karras_sigmas:
            sigmas = karras_sigmas(float(sigmas[0]), float(sigmas[-1]), steps)
            picked = np.interp(np.log(sigmas), np.log(levels), indices).astype(np.float32)
        self.timesteps = tuple(float(t) for t in picked)
        self.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
        top = self.sigmas.max()
        self.init_scale = float((top**2 + 1) ** 0.5 if spacing == "leading" else top)

    def scale_input(self, x: Tensor, index: int) -> Tensor:
        """Give the model latents of unit variance."""
        return x / float((self.sigmas[index] ** 2 + 1) ** 0.5)

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Follow the line from the clean estimate down to the next sigma."""
        sigma, following = float(self.sigmas[index]), float(self.sigmas[index + 1])
        clean_weight = 1 / (sigma**2 + 1) ** 0.5
        shown, noise_weight = x * clean_weight, sigma * clean_weight
        clean = x - sigma * _noise(self.facts, output, shown, clean_weight, noise_weight)
        slope: Tensor = (x - clean) / sigma
        return x + slope * (following - sigma)


@dataclass(slots=True)
class FlowEuler:
    """Euler steps along a flow's velocity, from time 1 to 0."""

    facts: SchedulerFacts
    steps: int
    tokens: int
    init_scale: float = 1.0
    sigmas: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Lay out the flow times for a picture of `tokens` tokens."""
        self.sigmas = tuple(flow_sigmas(self.facts, self.steps, self.tokens).tolist())

    @property
    def timesteps(self) -> tuple[float, ...]:
        """1000 times the flow time."""
        count = self.facts.num_train_timesteps
        return tuple(float(np.float32(sigma) * np.float32(count)) for sigma in self.sigmas[:-1])

    def scale_input(self, x: Tensor, index: int) -> Tensor:
        """Show the latents as they are."""
        return x

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Follow the velocity to the next flow time."""
        moved: Tensor = x + (self.sigmas[index + 1] - self.sigmas[index]) * output
        return moved


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """A sampler by name.

    Attributes:
        make: (facts, steps, picture tokens) -> Sampler.
        flow: whether it integrates a flow (Flux) rather than a diffusion (SD).
        classes: diffusers scheduler classes it stands for.
    """

    make: Callable[[SchedulerFacts, int, int], Sampler]
    flow: bool
    classes: tuple[str, ...]


SAMPLERS: Mapping[str, SamplerRow] = {
    "ddim": SamplerRow(Ddim, flow=False, classes=("DDIMScheduler",)),
    "euler": SamplerRow(Euler, flow=False, classes=("EulerDiscreteScheduler",)),
    "pndm": SamplerRow(Pndm, flow=False, classes=("PNDMScheduler",)),
    "flow_euler": SamplerRow(FlowEuler, flow=True, classes=("FlowMatchEulerDiscreteScheduler",)),
}


def default_sampler(facts: SchedulerFacts, *, flow: bool) -> str:
    """Name of the sampler a checkpoint asks for; one that names no scheduler gets Euler.

    Raises:
        UsageError: the checkpoint names a scheduler that has no row; the message lists what there
            is.
    """
    if not facts.name:
        return "flow_euler" if flow else "euler"
    for name, row in SAMPLERS.items():
        if facts.name in row.classes and row.flow == flow:
            return name
    known = ", ".join(name for name, row in SAMPLERS.items() if row.flow == flow)
    raise UsageError(
        f"the checkpoint's scheduler {facts.name} is not implemented, name a sampler: {known}"
    )


def make_sampler(
    name: str, facts: SchedulerFacts, *, steps: int, tokens: int, flow: bool = False
) -> Sampler:
    """Plan a run of `steps` with sampler `name`; "euler" means "flow_euler" for flow models.

    Raises:
        UnknownFormat: no such sampler.
        UsageError: the sampler does not fit the kind of model.
    """
    if flow and name == "euler":
        name = "flow_euler"
    if name not in SAMPLERS:
        raise UnknownFormat(name, SAMPLERS, what="sampler")
    if SAMPLERS[name].flow != flow:
        known = ", ".join(key for key, row in SAMPLERS.items() if row.flow == flow)
        raise UsageError(f"sampler {name!r} does not fit this model (fitting: {known})")
    return SAMPLERS[name].make(facts, steps, tokens)
