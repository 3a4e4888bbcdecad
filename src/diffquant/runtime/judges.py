"""How alike two pictures are, and whether a picture is one at all.

Pictures are float arrays (H, W, 3) in [0, 1], before rounding to 8 bits. `Pooled` adds squared
errors over many pairs, so that its PSNR is that of all pixels together; identical pictures have no
PSNR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pair", "Pooled", "defects", "psnr_db", "ssim"]

Picture = NDArray[np.float32]

_FLAT = 0.01  # standard deviation under which a picture shows nothing: 2.5 steps of 256
_DARK = 0.02  # mean under which a picture is black
# Neighbouring pixels of white noise differ by sqrt(2) times its deviation; of pictures by far less.
_NOISE = 1.1


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and seed through both sides. `psnr_db` is None when the pictures are identical."""

    prompt: str
    seed: int
    psnr_db: float | None
    ssim: float
    defects: tuple[str, ...] = ()


@dataclass(slots=True)
class Pooled:
    """Squared error over any number of picture pairs."""

    squared: float = 0.0
    count: int = 0
    each: list[float] = field(default_factory=list)

    def add(self, reference: Picture, candidate: Picture) -> float:
        """Add a pair; return its mean squared error."""
        difference = reference.astype(np.float64) - candidate.astype(np.float64)
        total = float((difference**2).sum())
        self.squared += total
        self.count += difference.size
        self.each.append(total / difference.size)
        return total / difference.size

    @property
    def psnr_db(self) -> float | None:
        """PSNR of all pixels together, None when every pair is identical."""
        return _decibel(self.squared / self.count) if self.count else None

    def interval_db(self) -> tuple[float, float] | None:
        """95 % bootstrap interval of the pooled PSNR over pairs; None below two differing pairs."""
        if len(self.each) < 2 or self.squared == 0:
            return None
        errors = np.array(self.each)
        picks = np.random.default_rng(0).integers(0, errors.size, (2000, errors.size))
        means = errors[picks].mean(axis=1)
        low, high = np.quantile(means, (0.975, 0.025))
        return _decibel(float(low)) or math.inf, _decibel(float(high)) or math.inf


def _decibel(mse: float) -> float | None:
    if not math.isfinite(mse):
        return float("nan")
    return -10.0 * math.log10(mse) if mse > 0 else None


def psnr_db(reference: Picture, candidate: Picture) -> float | None:
    """PSNR of one pair, None when identical, NaN when a picture is not finite."""
    pooled = Pooled()
    pooled.add(reference, candidate)
    return pooled.psnr_db


def ssim(reference: Picture, candidate: Picture) -> float:
    """Structural similarity, mean over channels (scikit-image, 7x7 windows, data range 1)."""
    from skimage.metrics import structural_similarity

    if not (np.isfinite(reference).all() and np.isfinite(candidate).all()):
        return float("nan")
    return float(structural_similarity(reference, candidate, channel_axis=2, data_range=1.0))


def defects(picture: Picture) -> tuple[str, ...]:
    """Name what is wrong with a picture by itself: not finite, black, flat, or noise."""
    if not np.isfinite(picture).all():
        return ("not finite",)
    found = []
    if float(picture.mean(dtype=np.float64)) < _DARK:
        found.append("black")
    # By channel: red on blue is flat in grey.
    deviation = float(picture.std(axis=(0, 1), dtype=np.float64).max())
    if deviation < _FLAT:
        found.append("flat")
    else:
        steps = max(
            float(np.sqrt((np.diff(picture, axis=axis).astype(np.float64) ** 2).mean()))
            for axis in (0, 1)
        )
        if steps > _NOISE * deviation:
            found.append("noise")
    return tuple(found)
