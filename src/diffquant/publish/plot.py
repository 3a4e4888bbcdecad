"""Layout of the size-against-PSNR plot; the template turns it into inline SVG.

Coordinates are SVG user units with y down. Size has a logarithmic axis, because types halve it;
identical pictures have no PSNR and sit on a rail above the scale. Labels take the first of a few
places around their mark where they hide nothing, and are left out when there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from diffquant.publish.rows import DemoModel, DemoRow, decibel_text, size_text

__all__ = ["Mark", "Plot", "Tick", "plot_of"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 14.0, 30.0, 34.0
_CHAR, _LINE = 6.7, 13.0  # width and height of a label's letter at 12 units
_RADIUS = 5.0

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Axis = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Tick:
    """A value on an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A type's point, the start of its label's base line, and the height of its control."""

    x: float
    y: float
    verdict: str
    title: str
    label: str
    label_at: tuple[float, float] | None
    control_y: float | None


@dataclass(frozen=True, slots=True)
class Plot:
    """Everything the template draws; `floor_y` is the noise floor, `rail_y` identical pictures."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    floor_y: float | None
    floor_text: str
    rail_y: float | None


def plot_of(model: DemoModel, width: int, height: int) -> Plot | None:
    """Lay the plot out for a drawing of `width` by `height` units; None when no row has a PSNR."""
    rows = [row for row in model.rows if row.nbytes > 0 and (row.identical or _known(row.psnr_db))]
    if not rows:
        return None
    bottom = height - _BOTTOM
    across, x_ticks = _size_axis([row.nbytes for row in rows], width - _RIGHT)
    floor = model.noise_floor_psnr_db
    measured = [value for row in rows for value in (row.psnr_db, row.control_psnr_db)]
    down, y_ticks = _decibel_axis([v for v in (*measured, floor) if _known(v)], bottom)
    rail = _TOP - 14
    points = [
        (across(row.nbytes), rail if row.identical or row.psnr_db is None else down(row.psnr_db))
        for row in rows
    ]
    controls = [down(row.control_psnr_db) if _known(row.control_psnr_db) else None for row in rows]
    marks = []
    taken = [_around(x, y) for x, y in points]
    taken += [_around(x, y) for (x, _), y in zip(points, controls, strict=True) if y is not None]
    floor_text = f"noise floor {decibel_text(floor)}"
    if _known(floor):
        wide = _LEFT + 4 + _CHAR * len(floor_text)
        taken.append((_LEFT, down(floor) - 5 - _LINE, wide, down(floor)))
    for row, (x, y), control in zip(rows, points, controls, strict=True):
        box = _place(row.type, x, y, taken, (_LEFT, 0.0, float(width), bottom))
        if box is not None:
            taken.append(box)
        marks.append(
            Mark(x, y, row.verdict, _title(row), row.type, box and (box[0], box[3] - 3), control)
        )
    return Plot(
        width=width,
        height=height,
        left=_LEFT,
        right=width - _RIGHT,
        top=_TOP,
        bottom=bottom,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        marks=tuple(marks),
        floor_y=down(floor) if _known(floor) else None,
        floor_text=floor_text,
        rail_y=rail if any(row.identical for row in rows) else None,
    )


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _title(row: DemoRow) -> str:
    value = decibel_text(row.psnr_db, identical=row.identical)
    return f"{row.type}: {size_text(row.nbytes)}, {value}, {row.verdict}"


def _size_axis(sizes: Sequence[int], right: float) -> tuple[Axis, tuple[Tick, ...]]:
    """Powers of two, or of their roots where fewer than three would fit."""
    low, high = math.log2(min(sizes)), math.log2(max(sizes))
    pad = max(0.15 * (high - low), 0.2)  # room for labels beside the outermost marks
    low, high = low - pad, high + pad

    def across(nbytes: float) -> float:
        return round(_LEFT + (math.log2(nbytes) - low) / (high - low) * (right - _LEFT), 1)

    room = max(3, int((right - _LEFT) // 70))
    best: list[float] = []
    for step in (4.0, 2.0, 1.0, 0.5, 0.25, 0.125):
        fits = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(fits) > room:
            break
        best = fits
    return across, tuple(Tick(across(2**power), size_text(2**power)) for power in best)


def _decibel_axis(values: Sequence[float], bottom: float) -> tuple[Axis, tuple[Tick, ...]]:
    """Whole steps of 5, 10 or 20 dB around every value."""
    least, most = min(values, default=20.0), max(values, default=60.0)
    step = next((s for s in (5, 10, 20) if (most - least) / s <= 7), 50)
    low, high = math.floor(least / step) * step, math.ceil(most / step) * step
    high = max(high, low + step)

    def down(value: float) -> float:
        return round(bottom - (value - low) / (high - low) * (bottom - _TOP), 1)

    return down, tuple(Tick(down(value), str(value)) for value in range(low, high + 1, step))


def _around(x: float, y: float) -> Box:
    return (x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS)


def _place(text: str, x: float, y: float, taken: Sequence[Box], frame: Box) -> Box | None:
    """Find room for a label right of, left of, above or below its mark."""
    wide, half, away = _CHAR * len(text), _LINE / 2, _RADIUS + 3
    above, below = y - away - half, y + away + half
    for left, middle in (
        (x + away, y),
        (x - away - wide, y),
        (x - wide / 2, above),
        (x - wide / 2, below),
        (x + away, y - half),
        (x + away, y + half),
        (x - away - wide, y - half),
        (x - away - wide, y + half),
        (x + 2, above),
        (x + 2, below),
        (x - wide - 2, above),
        (x - wide - 2, below),
    ):
        box = (round(left, 1), round(middle - half, 1), left + wide, round(middle + half, 1))
        inside = (
            box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
        )
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
