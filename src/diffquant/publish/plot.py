"""Layout of size-against-quality plots; the template turns them into inline SVG.

Coordinates are SVG user units with y down. Up is always nearer to the reference: where a smaller
value is better the axis is turned round. File sizes have a logarithmic axis, because types halve
them. Pictures that are identical have no PSNR and sit on a rail above the scale. Floor and control
are lines; one that lies far outside of what the files reach is said at the edge instead of
squeezing them. Labels take the first of a few places around their mark where they hide nothing, and
are left out when there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffquant.publish.plot_axes import AXES, Axis, Tick, size_axis, value_axis, value_of
from diffquant.publish.rows import number_text
from diffquant.runtime.comparison import METRICS, Comparison, Metric, Row

__all__ = ["Line", "Mark", "Plot", "pareto_front", "plot_of"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 34.0, 38.0
_CHAR, _LINE = 6.7, 13.0  # width and height of a label's letter at 12 units
_RADIUS = 5.0
_LONGEST = 22  # letters of a label
_FAR = 1.5  # a line further than this many spreads of the files' values is not drawn to scale

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True, slots=True)
class Mark:
    """A file's point, its label, and where that label's base line starts."""

    x: float
    y: float
    verdict: str
    title: str
    label: str
    label_at: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Line:
    """The floor's or the control's value; `beyond` is "above" or "below" off the scale, else ""."""

    kind: str
    y: float
    text: str
    text_y: float
    beyond: str = ""


@dataclass(frozen=True, slots=True)
class Plot:
    """Everything the template draws; `rail_y` is where identical pictures sit."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    lines: tuple[Line, ...]
    front: tuple[str, ...]  # names, smallest first
    front_path: str
    rail_y: float | None


def pareto_front(comparison: Comparison, metric: str, axis: str) -> tuple[Row, ...]:
    """Files that no other beats: none is as small and nearer, or smaller and as near."""
    sign = 1.0 if METRICS[metric].better == "up" else -1.0
    points = [
        (size, sign * value if math.isfinite(value) else value, row)
        for row in comparison.candidates
        if (size := AXES[axis].read(row)) and (value := value_of(row, metric)) is not None
    ]
    return tuple(
        row
        for size, value, row in sorted(points, key=lambda point: (point[0], -point[1]))
        if not any((s <= size and v > value) or (s < size and v >= value) for s, v, _ in points)
    )


def plot_of(
    comparison: Comparison, metric: str, axis: str, *, width: int, height: int
) -> Plot | None:
    """Lay a plot out for a drawing of `width` by `height` units; None when there is no point.

    Args:
        comparison: its candidates are the points.
        metric: key of METRICS, for the vertical axis.
        axis: key of AXES, for the horizontal one.
        width: units.
        height: units.
    """
    what, across_what = METRICS[metric], AXES[axis]
    points = [
        (row, float(size), value)
        for row in comparison.candidates
        if (size := across_what.read(row)) and (value := value_of(row, metric)) is not None
    ]
    if not points:
        return None
    bottom = height - _BOTTOM
    across, x_ticks = size_axis(axis, [size for _, size, _ in points], (_LEFT, width - _RIGHT))
    finite = [value for *_, value in points if math.isfinite(value)]
    beside = [
        (row, value)
        for row in comparison.rows
        if row.kind in ("floor", "control")
        and (value := value_of(row, metric)) is not None
        and math.isfinite(value)
    ]
    shown = _near(finite, [value for _, value in beside])
    down, y_ticks = value_axis(what, [*finite, *shown], (_TOP, bottom))
    rail = _TOP - 14
    places = {
        row.name: (across(size), down(value) if math.isfinite(value) else rail)
        for row, size, value in points
    }
    lines = _lines(beside, what, down, bottom)
    taken = [_around(x, y) for x, y in places.values()]
    taken += [
        (_LEFT, line.text_y - _LINE, _LEFT + 4 + _CHAR * len(line.text), line.text_y + 3)
        for line in lines
    ]
    front = pareto_front(comparison, metric, axis)
    names = {row.name for row in front}
    marks = []
    for row, size, value in points:
        x, y = places[row.name]
        label = _short(row.type or row.name)
        box = _place(
            label, x, y, taken, (_LEFT, 0.0, float(width), bottom), ahead=row.name in names
        )
        if box is not None:
            taken.append(box)
        reached = "identical" if math.isinf(value) else f"{what.title} {_text(value, what)}"
        title = f"{row.name}: {across_what.text(size)}, {reached}, {row.verdict or 'not judged'}"
        marks.append(Mark(x, y, row.verdict, title, label, box and (box[0], box[3] - 3)))
    return Plot(
        width=width,
        height=height,
        left=_LEFT,
        right=width - _RIGHT,
        top=_TOP,
        bottom=bottom,
        x_title=across_what.title,
        y_title=f"{what.title}{f', {what.unit}' if what.unit else ''}",
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        marks=tuple(marks),
        lines=lines,
        front=tuple(row.name for row in front),
        front_path=_steps([places[row.name] for row in front]),
        rail_y=rail if any(math.isinf(value) for *_, value in points) else None,
    )


def _text(value: float, what: Metric) -> str:
    text = number_text(value, what.digits)
    return f"{text} {what.unit}" if what.unit and text[-1].isdigit() else text


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _near(values: Sequence[float], beside: Sequence[float]) -> list[float]:
    """Those of `beside` that can share an axis with `values`."""
    if not values:
        return list(beside)
    low, high = min(values), max(values)
    room = _FAR * ((high - low) or abs(high) or 1.0)
    return [value for value in beside if low - room <= value <= high + room]


def _lines(
    beside: Sequence[tuple[Row, float]], what: Metric, down: Axis, bottom: float
) -> tuple[Line, ...]:
    """Lines of floor and control; labels that would lie on one another move apart."""
    lines: list[Line] = []
    for row, value in beside:
        name = "noise floor" if row.kind == "floor" else "control"
        text = f"{name} {_text(value, what)}"
        y = down(value)
        beyond = "above" if y < _TOP - 1 else "below" if y > bottom + 1 else ""
        at = {"above": _TOP + 8, "below": bottom - 2}.get(beyond, y)
        text_y = at - 5 if at - 5 - _LINE > 0 else at + _LINE
        text = f"{text}, {beyond} the scale" if beyond else text
        while any(abs(text_y - line.text_y) < _LINE for line in lines):
            text_y += _LINE if text_y < (bottom + _TOP) / 2 else -_LINE
        lines.append(Line(row.kind, at, text, round(text_y, 1), beyond))
    return tuple(lines)


def _steps(points: Sequence[tuple[float, float]]) -> str:
    """A staircase: up to the next file's size nothing is nearer than the one before."""
    if len(points) < 2:
        return ""
    path = f"M{points[0][0]} {points[0][1]}"
    return path + "".join(f"H{x}V{y}" for x, y in points[1:])


def _around(x: float, y: float) -> Box:
    return (x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS)


def _place(
    text: str, x: float, y: float, taken: Sequence[Box], frame: Box, *, ahead: bool
) -> Box | None:
    """Find room for a label around its mark.

    Args:
        text: the label.
        x: of the mark.
        y: of the mark.
        taken: where something stands already.
        frame: what it has to stay in.
        ahead: the mark is on the front, so up and left of it is free; others have room below.
    """
    wide, half, away = _CHAR * len(text), _LINE / 2, _RADIUS + 3
    above, below = y - away - half, y + away + half
    first = (x - wide - 2, above) if ahead else (x + 2, below)
    for left, middle in (
        first,
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
