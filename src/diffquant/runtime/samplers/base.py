"""What every sampler is: the run protocol, what it is asked for, and what a prediction means.

The loop is always the same::

    x = noise * sampler.init_scale            # or sampler.add_noise(picture, noise, 0)
    for index, t in enumerate(sampler.timesteps):
        x = sampler.step(model(sampler.scale_input(x, index), t), x, index)

A call of the model is one index, so samplers that look twice a step list two calls. Latents are
clean * a + noise * s in one of three conventions: a = 1 (Euler and its kin over sigma), a**2 + s**2
= 1 (DDIM, DPM++), a = 1 - s (flows); they stay float32 whatever the model computes in.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.levels import WHOLE, Levels, Part, Walk
from diffquant.runtime.schedules import SchedulerFacts
from diffquant.runtime.walks import diffusion_walk

__all__ = ["Draw", "Request", "Sampler", "clean_of", "drawn", "mixed", "noise_of", "table_walk"]

Draw: TypeAlias = Callable[[tuple[int, ...]], Tensor]


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

    def estimate(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """The clean latents that the model's output at call `index` means; asked before `step`."""
        ...

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """Noise clean latents to the level of call `index`; len(timesteps) is where the run ends.

        Index 0 starts a run from a picture; index + 1 after a step keeps what a mask protects.
        """
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """What a run is made from.

    Attributes:
        facts: what the checkpoint says about its schedule.
        steps: steps of the whole run.
        tokens: of the picture, for shifts that depend on it.
        schedule: a name, levels one by one, or None: the checkpoint's.
        part: the stretch that is walked.
        draw: shape -> standard normal noise, for samplers that add some; called in call order.
        eta: how much of it, for samplers that let one choose.
        architecture: slug, for schedules made for one model.
    """

    facts: SchedulerFacts
    steps: int
    tokens: int = 0
    schedule: str | Levels | None = None
    part: Part = field(default=WHOLE)
    draw: Draw | None = None
    eta: float | None = None
    architecture: str = ""

    def walk(self, spacing: str, *, spare: bool = False) -> Walk:
        """The levels of a diffusion run; `spacing` is what a silent config means."""
        whole = diffusion_walk(
            self.facts,
            self.steps,
            self.schedule,
            spacing=spacing,
            spare=spare,
            architecture=self.architecture,
        )
        return whole.part(self.part, self.facts.num_train_timesteps)

    def stochasticity(self, default: float) -> float:
        """`eta`, or the default.

        Raises:
            UsageError: outside 0 to 1.
        """
        eta = default if self.eta is None else self.eta
        if not 0 <= eta <= 1:
            raise UsageError(f"eta must be between 0 and 1, found {eta:g}")
        return eta


def table_walk(request: Request, spacing: str) -> Walk:
    """A walk over whole timesteps, for samplers that look levels up in the table.

    Raises:
        UsageError: two steps would round to the same timestep.
    """
    walk = request.walk(spacing)
    told = tuple(float(round(t)) for t in walk.timesteps)  # to even, as numpy does
    if any(a <= b for a, b in itertools.pairwise(told[:-1])):
        raise UsageError(
            f"{request.steps} steps are too many for whole timesteps: two would coincide"
        )
    return dataclasses.replace(walk, timesteps=told)


def clean_of(kind: str, output: Tensor, x: Tensor, a: float, s: float) -> Tensor:
    """The clean latents that a model output means, where x = a clean + s noise.

    Args:
        kind: prediction type as diffusers names it; for v_prediction a**2 + s**2 = 1, for
            flow_prediction a = 1 - s.
        output: what the model said.
        x: what it was shown.
        a: weight of the clean latents.
        s: weight of the noise.

    Raises:
        ArchitectureError: no such prediction type.
        UsageError: an epsilon at a level of noise alone tells nothing about the picture.
    """
    match kind:
        case "epsilon":
            if a == 0:
                raise UsageError(
                    "a model that predicts noise cannot start at a signal of zero: leave the last "
                    "timestep out (spacing leading) or use a v-prediction model"
                )
            return (x - s * output) / a
        case "v_prediction":
            return a * x - s * output
        case "sample":
            return output
        case "flow_prediction":
            return x - s * output
        case other:
            known = "epsilon, v_prediction, sample, flow_prediction"
            raise ArchitectureError(f"prediction type {other!r} is not supported (known: {known})")


def noise_of(kind: str, output: Tensor, x: Tensor, a: float, s: float) -> Tensor:
    """The noise that a model output means, where x = a clean + s noise; see `clean_of`."""
    match kind:
        case "epsilon":
            return output
        case "v_prediction":
            return a * output + s * x
        case "flow_prediction":
            return x + a * output
        case _:
            return (x - a * clean_of(kind, output, x, a, s)) / s


def mixed(clean: Tensor, noise: Tensor, a: float, s: float) -> Tensor:
    """Latents of `a` parts of the clean ones and `s` parts of noise."""
    return a * clean + s * noise


def drawn(draw: Draw | None, x: Tensor) -> Tensor:
    """Noise for latents `x`, on their device."""
    assert draw is not None, "make_sampler asks for it"
    return draw(tuple(x.shape)).to(x.device, torch.float32)
