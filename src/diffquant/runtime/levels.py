"""Levels given one by one, the stretch of a run that is walked, and the walk itself: plain data.

A walk has one timestep and one sigma per step, and one more pair where it ends. For diffusion
models sigma is noise per clean signal, sqrt((1 - alpha) / alpha), and the run ends at 0; for flows
it is the flow time itself, from 1 to 0. How walks are laid out is in walks.py; here is no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

from diffquant.core.errors import UsageError

__all__ = ["WHOLE", "Levels", "Part", "Walk"]


@dataclass(frozen=True, slots=True)
class Levels:
    """Levels given one by one, noisiest first and without the final 0: timesteps or sigmas.

    Attributes:
        timesteps: of diffusion models, training timesteps.
        sigmas: noise levels; flow times for flows.
        bent: whether a flow's own shift still applies to them.
    """

    timesteps: tuple[float, ...] = ()
    sigmas: tuple[float, ...] = ()
    bent: bool = False

    def __post_init__(self) -> None:
        """Check that one of the two is given, and that it falls."""
        if bool(self.timesteps) == bool(self.sigmas):
            raise UsageError("give either timesteps or sigmas, at least one of them")
        levels = self.timesteps or self.sigmas
        floor = 0.0 if self.timesteps else 1e-30
        falling = all(a > b for a, b in itertools.pairwise(levels))
        if not all(math.isfinite(level) for level in levels) or levels[-1] < floor or not falling:
            shown = ", ".join(f"{level:g}" for level in levels)
            raise UsageError(
                f"levels must fall from noise to picture and stay above 0, found {shown}; "
                "the final 0 is not written"
            )


@dataclass(frozen=True, slots=True)
class Part:
    """Which stretch of a run is walked; all of it by default.

    Attributes:
        strength: how much of a given picture is drawn anew: the last steps * strength steps,
            rounded down for diffusion models and up for flows.
        begin: index of the first step instead; `end`: index of the first step not walked.
        start: share of the training timesteps that another model has walked already.
        stop: share after which this run leaves the rest to another model (base 0.8, refiner 0.8).
    Source: huggingface/diffusers 0.42 get_timesteps of pipelines/stable_diffusion_xl and
    pipelines/flux (img2img), denoising_end of the former.
    """

    strength: float = 1.0
    begin: int = 0
    end: int | None = None
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges, and that the first step is said in one way only."""
        if not 0 < self.strength <= 1:
            raise UsageError(f"strength must be above 0 and at most 1, found {self.strength:g}")
        if not 0 <= self.start < self.stop <= 1:
            raise UsageError(
                f"a run goes from a start to a later stop within 0 and 1, found {self.start:g} and "
                f"{self.stop:g}"
            )
        if (self.strength < 1) + (self.begin > 0) + (self.start > 0) > 1:
            raise UsageError("strength, begin and start all say where a run begins: give one")

    def bounds(self, walk: Walk, count: int) -> tuple[int, int]:
        """First step and end, of `walk` over `count` training timesteps.

        Raises:
            UsageError: nothing would be left.
        """
        steps = len(walk.timesteps) - 1
        share = min(steps * self.strength, steps)
        # a part of a step counts as one for flows, and not at all for diffusion models
        begin = self.begin or (int(steps - share) if walk.flow else steps - int(share))
        if self.start > 0:
            cut = round(count - self.start * count)
            begin = sum(t >= cut for t in walk.timesteps[:-1])
        end = steps if self.end is None else self.end
        if self.stop < 1:
            cut = round(count - self.stop * count)
            end = min(end, sum(t >= cut for t in walk.timesteps[:-1]))
        if not 0 <= begin < end <= steps:
            raise UsageError(
                f"no step is left of {steps}: the run would go from step {begin} to {end}; "
                "use more steps or a longer stretch"
            )
        return begin, end


WHOLE = Part()


@dataclass(frozen=True, slots=True)
class Walk:
    """The levels of a run.

    Attributes:
        timesteps: what the model is told at each level, the last where the run ends.
        sigmas: the levels, as many.
        total: steps of the whole run, of which this may be a part.
        offset: how many of them come before this part.
        unit: whether the first latents have variance sigma**2 + 1, or sigma**2.
        even: whether timesteps keep one distance, which diffusers' DDIM and PNDM step by.
        flow: whether levels are flow times.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    total: int
    offset: int = 0
    unit: bool = False
    even: bool = False
    flow: bool = False

    def part(self, part: Part, count: int) -> Walk:
        """The stretch of it that `part` asks for."""
        begin, end = part.bounds(self, count)
        cut = slice(begin, end + 1)
        return dataclasses.replace(
            self, timesteps=self.timesteps[cut], sigmas=self.sigmas[cut], offset=begin
        )
