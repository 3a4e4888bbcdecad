"""From the values of pairs to the value of a row: mean, interval and worst pair.

PSNR is pooled: dB of the mean squared error over all pairs, so that its pixels count alike.
Intervals are 95 % bootstrap percentiles over pairs, from one seed, so that they repeat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffquant.runtime.comparison import METRICS, Value

__all__ = ["value_of"]

_RESAMPLES = 2000
_LOW, _HIGH = 0.025, 0.975


def value_of(metric: str, each: Sequence[float | None]) -> Value:
    """Sum up a metric over pairs of equal size.

    Args:
        metric: key of METRICS.
        each: one value a pair; None for identical pictures, where the metric has none for that.

    Returns:
        NaN for everything where one value is not a number: a mean over the rest would hide it.
    """
    if metric == "psnr":
        return _pooled(each)
    numbers = np.array([math.nan if one is None else one for one in each], np.float64)
    if not np.isfinite(numbers).all():
        return Value(math.nan, worst=math.nan)
    worst = numbers.min() if METRICS[metric].better == "up" else numbers.max()
    if len(numbers) < 2:
        return Value(float(numbers.mean()), worst=float(worst))
    low, high = np.quantile(_means(numbers), (_LOW, _HIGH))
    return Value(float(numbers.mean()), float(low), float(high), float(worst))


def _pooled(each: Sequence[float | None]) -> Value:
    errors = np.array([0.0 if one is None else 10 ** (-one / 10) for one in each], np.float64)
    if not np.isfinite(errors).all():
        return Value(math.nan, worst=math.nan)
    if not errors.any():
        return Value(None)
    mean, worst = _decibel(errors.mean()), _decibel(errors.max())
    if len(errors) < 2:
        return Value(mean, worst=worst)
    high, low = np.quantile(_means(errors), (_LOW, _HIGH))
    return Value(mean, _decibel(low), _decibel(high), worst)


def _means(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of resampled pairs."""
    picks = np.random.default_rng(0).integers(0, numbers.size, (_RESAMPLES, numbers.size))
    means: NDArray[np.float64] = numbers[picks].mean(axis=1)
    return means


def _decibel(mse: float) -> float:
    return math.inf if mse <= 0 else -10.0 * math.log10(mse)
