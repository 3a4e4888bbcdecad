"""DPM++ 2M and 2M SDE: second order over two steps, exact in the linear part.

Written over lambda = log(a / s), so that one class serves diffusion models and flows.
Source: arXiv:2211.01095 algorithm 2, its stochastic form appendix D; huggingface/diffusers 0.42
schedulers/scheduling_dpmsolver_multistep.py for the order of the last steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.levels import Walk
from diffquant.runtime.samplers.base import Request, clean_of, drawn, mixed

__all__ = ["Dpm2M", "OverLambda", "flow_weights", "sphere_weights"]

_Weights = Callable[[float], tuple[float, float]]


def sphere_weights(sigma: float) -> tuple[float, float]:
    """Weights of clean latents and noise of diffusion latents of unit variance."""
    a = 1 / (sigma**2 + 1) ** 0.5
    return a, sigma * a


def flow_weights(sigma: float) -> tuple[float, float]:
    """Weights of clean latents and noise at a flow time.

    Pure noise keeps a millionth of signal, as diffusers' UniPC has it, or lambda would be infinite.
    """
    return max(1 - sigma, 1e-6), min(sigma, 1 - 1e-6)


def _lambda(weights: tuple[float, float]) -> float:
    a, s = weights
    return math.log(a) - math.log(s) if s > 0 else math.inf


class OverLambda:
    """What DPM++ and UniPC share: latents as the model sees them, levels by their lambda."""

    init_scale = 1.0

    def __init__(self, request: Request, walk: Walk, kind: str, weights: _Weights) -> None:
        """Keep weights and lambda of each level, the run's end included."""
        self.facts, self.walk, self.kind = request.facts, walk, kind
        self.timesteps = walk.timesteps[:-1]
        self.levels = tuple(weights(sigma) for sigma in walk.sigmas)
        self.lambdas = tuple(_lambda(level) for level in self.levels)

    def scale_input(self, x: Tensor, index: int) -> Tensor:
        """Show the latents as they are."""
        return x

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """Noise clean latents to the level of call `index`."""
        return mixed(clean, noise, *self.levels[index])

    def left(self, index: int) -> int:
        """Steps of the whole run from call `index` on, itself included."""
        return self.walk.total - self.walk.offset - index

    def estimate(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """The clean latents that the output at call `index` means."""
        return self.clean(output, x, index)

    def clean(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """The clean estimate at call `index`."""
        a, s = self.levels[index]
        # a flow's velocity reaches the picture over its whole time, not the clamped one
        s = self.walk.sigmas[index] if self.kind == "flow_prediction" else s
        return clean_of(self.kind, output, x, a, s)


class Dpm2M(OverLambda):
    """Blend two clean estimates, then solve the rest of the step exactly."""

    def __init__(self, request: Request, walk: Walk, kind: str, weights: _Weights) -> None:
        """Plan a run; first order at its start, and at its end where that is safer."""
        if request.facts.solver_order > 2:
            raise UsageError(
                f"solver order {request.facts.solver_order} of DPM++ is not implemented, name "
                "another sampler: unipc has it"
            )
        super().__init__(request, walk, kind, weights)
        self.draw: Callable[[Tensor], Tensor] | None = None
        self.previous: Tensor | None = None

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Blend two clean estimates, then solve the rest of the step exactly."""
        clean = self.clean(output, x, index)
        h = self.lambdas[index + 1] - self.lambdas[index]
        previous, self.previous = self.previous, clean
        if previous is not None and not self._careful(index):
            ratio = h / (self.lambdas[index] - self.lambdas[index - 1])
            clean = clean + 0.5 * ratio * (clean - previous)
        (_, s), (a, following) = self.levels[index], self.levels[index + 1]
        if self.draw is None:
            return following / s * x - a * math.expm1(-h) * clean
        gained = -math.expm1(-2 * h)
        x = following / s * math.exp(-h) * x + a * gained * clean
        return x + following * gained**0.5 * self.draw(x) if following > 0 else x

    def _careful(self, index: int) -> bool:
        facts = self.facts
        short = facts.lower_order_final and self.walk.total < 15
        first_order = facts.solver_order == 1
        ending = facts.euler_at_final or short or facts.final_sigmas_type == "zero"
        return first_order or (self.left(index) == 1 and ending)


def dpmpp_2m(request: Request) -> Dpm2M:
    """DPM++ 2M for diffusion models."""
    walk = request.walk("linspace", spare=True)
    return Dpm2M(request, walk, request.facts.prediction_type, sphere_weights)


def dpmpp_2m_sde(request: Request) -> Dpm2M:
    """DPM++ 2M SDE for diffusion models."""
    run = dpmpp_2m(request)
    run.draw = lambda x: drawn(request.draw, x)
    return run
