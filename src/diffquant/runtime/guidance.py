"""Classifier-free guidance: push the prediction away from the negative prompt's.

A strength of 1 is no guidance at all, and costs one model call instead of two. Guidance may end
before the run does (`cutoff`), which saves the calls of the rest, and the guided prediction may be
brought back to the contrast of the positive one (`rescale`), which models trained to a terminal SNR
of zero need.
Sources: arXiv:2207.12598 equation 6; rescale arXiv:2305.08891 section 3.4 (phi).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from diffquant.core.errors import UsageError

__all__ = ["Guidance", "Guide", "guided", "needs_negative", "rescaled"]

# (positive, negative, cfg) -> the guided prediction.
Guide: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class Guidance:
    """How a run is guided.

    Attributes:
        cfg: strength; 1 and below mean none.
        rescale: phi, 0 for none to 1 for the positive prediction's own contrast; 0.7 is usual.
        cutoff: share of the model calls that are guided, the first ones.
    """

    cfg: float = 1.0
    rescale: float = 0.0
    cutoff: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.cfg < float("inf"):
            raise UsageError(f"cfg must be 0 or more, found {self.cfg:g}")
        for name in ("rescale", "cutoff"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(
                    f"cfg {name} must be between 0 and 1, found {getattr(self, name):g}"
                )

    @property
    def needs_negative(self) -> bool:
        """Whether a prediction guided so takes a negative one."""
        return needs_negative(self.cfg)

    def at(self, index: int, calls: int) -> Guidance:
        """The guidance of model call `index` of `calls`: this, or none where it is cut off."""
        if index < round(self.cutoff * calls):
            return self
        return dataclasses.replace(self, cfg=1.0)

    def apply(self, positive: Tensor, negative: Tensor, guide: Guide | None = None) -> Tensor:
        """The guided prediction; `guide` is a family's own way from both to one."""
        found = (guide or guided)(positive, negative, self.cfg)
        return rescaled(found, positive, self.rescale)


def needs_negative(cfg: float) -> bool:
    """Whether a strength needs the negative prediction; 0 and 1 mean off, users write both."""
    return cfg > 1.0


def guided(positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
    """Extrapolate from the negative prediction through the positive one, `cfg` times as far.

    Args:
        positive: (B, ...) prediction for the prompt.
        negative: (B, ...) for the negative prompt.
        cfg: strength.
    """
    return negative + cfg * (positive - negative)


def rescaled(found: Tensor, positive: Tensor, phi: float) -> Tensor:
    """Bring the contrast of a guided prediction back to that of the positive one.

    Args:
        found: (B, ...) guided prediction.
        positive: (B, ...) prediction for the prompt.
        phi: how far the standard deviation of each picture is brought back, 0 to 1.
    """
    if phi == 0:
        return found
    over = tuple(range(1, found.ndim))
    wanted, got = positive.std(dim=over, keepdim=True), found.std(dim=over, keepdim=True)
    # a constant prediction has no contrast to restore
    ratio = (wanted / got).where(got > 0, 1.0)
    return found * (phi * ratio + (1 - phi))
