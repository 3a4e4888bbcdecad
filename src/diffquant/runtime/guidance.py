"""Classifier-free guidance: push the prediction away from the negative prompt's.

Source: arXiv:2207.12598. A strength of 1 is no guidance at all, and costs one model call instead of
two.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["guided", "needs_negative"]


def needs_negative(cfg: float) -> bool:
    """Whether a strength needs the negative prediction; 0 and 1 mean off, users write both."""
    return cfg > 1.0


def guided(positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
    """Extrapolate from the negative prediction through the positive one, `cfg` times as far."""
    return negative + cfg * (positive - negative)
