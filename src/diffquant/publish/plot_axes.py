"""Axes of the size-against-quality plots: what stands on them, their scales and their ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffquant.publish.rows import size_text
from diffquant.runtime.comparison import Metric, Row

__all__ = ["AXES", "Axis", "SizeAxis", "Tick", "size_axis", "value_axis", "value_of"]

Axis = Callable[[float], float]

_WIDE = 3.0  # bits that differ by more than this factor get a logarithmic axis


@dataclass(frozen=True, slots=True)
class SizeAxis:
    """What the horizontal axis shows of a row."""

    title: str
    read: Callable[[Row], float | None]
    text: Callable[[float], str]


AXES: Mapping[str, SizeAxis] = {
    "size": SizeAxis("file size", lambda row: row.nbytes, size_text),
    "bits": SizeAxis("bits per weight", lambda row: row.bits_per_weight, lambda v: f"{v:.3g}"),
}


@dataclass(frozen=True, slots=True)
class Tick:
    """A value on an axis."""

    at: float
    text: str


def value_of(row: Row, metric: str) -> float | None:
    """The row's mean, infinity where its pictures are identical and have none, else None."""
    value = row.values.get(metric)
    if value is None:
        return None
    if value.mean is None:
        return math.inf if row.identical else None
    return value.mean if math.isfinite(value.mean) else None


def size_axis(
    axis: str, sizes: Sequence[float], span: tuple[float, float]
) -> tuple[Axis, tuple[Tick, ...]]:
    """Powers of two, or of their roots; bits in whole steps where they are not far apart."""
    left, right = span
    logarithmic = axis == "size" or max(sizes) > _WIDE * min(sizes)
    scale: Callable[[float], float] = math.log2 if logarithmic else float
    low, high = scale(min(sizes)), scale(max(sizes))
    pad = max(0.15 * (high - low), 0.2)  # room for labels beside the outermost marks
    low, high = low - pad, high + pad

    def across(value: float) -> float:
        return round(left + (scale(value) - low) / (high - low) * (right - left), 1)

    room = max(3, int((right - left) // 70))
    best: list[float] = []
    for step in (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125):
        fits = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(fits) > room:
            break
        best = fits
    values = [2**at if logarithmic else at for at in best]
    return across, tuple(Tick(across(v), AXES[axis].text(v)) for v in values if v > 0)


def value_axis(
    what: Metric, values: Sequence[float], span: tuple[float, float]
) -> tuple[Axis, tuple[Tick, ...]]:
    """Steps of 1, 2 or 5 times a power of ten around every value, five or six of them."""
    top, bottom = span
    least, most = min(values, default=20.0), max(values, default=60.0)
    turned = what.better == "down"
    pad = 0.04 * (most - least)  # the furthest file does not sit on the axis
    least, most = (least, most + pad) if turned else (least - pad, most)
    rough = max((most - least) / 5, 10.0**-what.digits)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(least / step), math.ceil(most / step)
    last = max(last, first + 1)
    low, high = first * step, last * step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))

    def down(value: float) -> float:
        share = (value - low) / (high - low)
        return round(bottom - (1 - share if turned else share) * (bottom - top), 1)

    ticks = (n * step for n in range(first, last + 1))
    return down, tuple(Tick(down(value), f"{value:.{digits}f}") for value in ticks)
