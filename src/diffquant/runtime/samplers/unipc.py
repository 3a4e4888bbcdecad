"""UniPC: a multistep prediction, corrected once the next call has seen where it led.

The B2 variant over clean estimates, of order one to three.
Source: arXiv:2302.04867 algorithms 5 and 6, B_2(h) = e^h - 1; huggingface/diffusers 0.42
schedulers/scheduling_unipc_multistep.py for the order of the last steps and the fixed 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.levels import Walk
from diffquant.runtime.samplers.base import Request
from diffquant.runtime.samplers.dpm import OverLambda, sphere_weights

__all__ = ["UniPc", "unipc"]


def _system(ratios: list[float], h: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows of powers of `ratios` and what they must sum to: (K, K), (K,)."""
    grown = math.expm1(-h)
    phi, factorial = grown / -h - 1, 1.0
    rows, sums = [], []
    for power in range(len(ratios)):
        rows.append([ratio**power for ratio in ratios])
        sums.append(phi * factorial / grown)
        factorial *= power + 2
        phi = phi / -h - 1 / factorial
    return np.array(rows), np.array(sums)


class UniPc(OverLambda):
    """Correct the last step with what is seen now, then predict the next."""

    def __init__(
        self,
        request: Request,
        walk: Walk,
        kind: str,
        weights: Callable[[float], tuple[float, float]],
    ) -> None:
        """Plan a run."""
        super().__init__(request, walk, kind, weights)
        if not 1 <= request.facts.solver_order <= 3:
            raise UsageError(
                f"solver order {request.facts.solver_order} of UniPC is not implemented (known: 1 "
                "to 3)"
            )
        self.estimates: list[Tensor] = []  # clean ones, the latest last
        self.before: Tensor | None = None  # latents the last step began from
        self.order = 0

    def step(self, output: Tensor, x: Tensor, index: int) -> Tensor:
        """Correct the last step with what is seen now, then predict the next."""
        clean = self.clean(output, x, index)
        if self.before is not None:
            x = self._correct(clean, index)
        facts = self.facts
        self.estimates = [*self.estimates[-(facts.solver_order - 1) :], clean]
        if facts.solver_order == 1:
            self.estimates = [clean]
        allowed = self.left(index) if facts.lower_order_final else facts.solver_order
        self.order = min(facts.solver_order, allowed, len(self.estimates), index + 1)
        self.before = x
        return self._predict(x, index)

    def _ratios(self, now: int, h: float, order: int) -> list[float]:
        """Where earlier levels lie, counted from level `now` in steps of `h`."""
        lambdas = self.lambdas
        return [(lambdas[now - back] - lambdas[now]) / h for back in range(1, order)]

    def _differences(self, estimates: list[Tensor], ratios: list[float]) -> list[Tensor]:
        latest = estimates[-1]
        return [(estimates[-2 - back] - latest) / ratio for back, ratio in enumerate(ratios)]

    def _base(self, x: Tensor, clean: Tensor, index: int) -> tuple[Tensor, float]:
        """The first order step from level `index`, and the weight of what is added to it."""
        (_, s), (a, following) = self.levels[index], self.levels[index + 1]
        gained = a * math.expm1(self.lambdas[index] - self.lambdas[index + 1])
        return following / s * x - gained * clean, gained

    def _predict(self, x: Tensor, index: int) -> Tensor:
        moved, gained = self._base(x, self.estimates[-1], index)
        if self.order == 1:
            return moved
        h = self.lambdas[index + 1] - self.lambdas[index]
        ratios = self._ratios(index, h, self.order)
        known = self._differences(self.estimates, ratios)
        if self.order == 2:
            shares = np.array([0.5])
        else:
            rows, sums = _system([*ratios, 1.0], h)
            shares = np.linalg.solve(rows[:-1, :-1], sums[:-1])
        for share, difference in zip(shares, known, strict=True):
            moved = moved - gained * float(share) * difference
        return moved

    def _correct(self, clean: Tensor, index: int) -> Tensor:
        assert self.before is not None
        began = index - 1
        moved, gained = self._base(self.before, self.estimates[-1], began)
        h = self.lambdas[index] - self.lambdas[began]
        ratios = self._ratios(began, h, self.order)
        known = [
            *self._differences(self.estimates, ratios),
            clean - self.estimates[-1],
        ]
        if self.order == 1:
            shares = np.array([0.5])
        else:
            shares = np.linalg.solve(*_system([*ratios, 1.0], h))
        for share, difference in zip(shares, known, strict=True):
            moved = moved - gained * float(share) * difference
        return moved


def unipc(request: Request) -> UniPc:
    """UniPC for diffusion models."""
    walk = request.walk("linspace", spare=True)
    return UniPc(request, walk, request.facts.prediction_type, sphere_weights)
