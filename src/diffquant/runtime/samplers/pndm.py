"""PNDM without its Runge-Kutta start, which others call PLMS: four outputs blended.

Source: arXiv:2202.09778 equations 9 and 12; huggingface/diffusers 0.42
schedulers/scheduling_pndm.py (skip_prk_steps).
"""

from __future__ import annotations

from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.samplers.base import Request, noise_of, table_walk
from diffquant.runtime.samplers.ddim import AlphaTable

__all__ = ["Pndm"]


class Pndm(AlphaTable):
    """Linear multistep over the last four outputs; the second timestep is visited twice.

    A run that starts part-way repeats its own second timestep; diffusers' would lose a step there.
    """

    def __init__(self, request: Request) -> None:
        """Plan a run of one call more than steps."""
        facts = request.facts
        walk = table_walk(request, "leading")
        if not walk.even:
            raise UsageError(
                "sampler 'pndm' needs evenly spaced timesteps: leading, trailing or linspace"
            )
        super().__init__(facts, walk, last_is_one=facts.set_alpha_to_one is True)
        spaced = walk.timesteps[:-1]
        self.timesteps = (*spaced[:2], *spaced[1:])
        self.outputs: list[Tensor] = []
        self.first: Tensor | None = None

    def after(self, index: int) -> float:
        """The timestep that call `index` leads to; the second call repeats the first step."""
        t = self.timesteps[index]
        return t if index == 1 else t - self.stride

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Blend the outputs so far and move."""
        t = self.timesteps[index]
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

    def _move(self, output: Tensor, x: Tensor, t: float, following: float) -> Tensor:
        (a, s), (b, r) = self.weights(t), self.weights(following)
        implied = noise_of(self.facts.prediction_type, output, x, a, s)
        if a == 0:
            raise UsageError(
                "sampler 'pndm' cannot start at a signal of zero: use ddim or spacing leading"
            )
        slope = a**2 * r + a * s * b
        return b / a * x - (b**2 - a**2) * implied / slope
