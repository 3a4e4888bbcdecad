"""Layout of the per-layer error chart: a dot a weight, in file order, by what it is stored as.

::

    0.10 |        2        x in percent of the drawing's width, so that one drawing serves every
         |  .  .    .      screen; y in pixels, 0 at the top. Weights that are not finite sit on
       0 |__.________.__   a rail at the top. The worst three are numbered.
          blocks   single
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from diffquant.publish.rows import number_text, size_text
from diffquant.runtime.comparison import Comparison, LayerError, Row

__all__ = ["Band", "Dot", "LayerChart", "layer_chart", "stored_formats"]

HEIGHT = 228
_TOP, _BOTTOM, _RAIL = 26.0, 200.0, 10.0
_WORST = 3
_BANDS = 12  # more runs of a leading name than this are not worth bands


@dataclass(frozen=True, slots=True)
class Dot:
    """A weight. `format` indexes the comparison's stored formats, `place` is its own in the file.

    `rank` is 1, 2 or 3 for the worst, else 0.
    """

    place: int
    x: float
    y: float
    format: int
    text: str
    rank: int
    layer: LayerError


@dataclass(frozen=True, slots=True)
class Band:
    """Neighbours whose keys begin alike: from `x` on, `width` wide, in percent."""

    x: float
    width: float
    label: str


@dataclass(frozen=True, slots=True)
class LayerChart:
    """A file's chart."""

    row: Row
    dots: tuple[Dot, ...]
    ticks: tuple[tuple[float, str], ...]  # y, text
    bands: tuple[Band, ...]
    formats: tuple[tuple[int, str, int], ...]  # index, name, how many weights
    worst: tuple[Dot, ...]
    rail_y: float | None
    height: int = HEIGHT


def stored_formats(comparison: Comparison) -> tuple[str, ...]:
    """What weights are stored as, over all rows, in order of first use: an index is a colour."""
    layers = (layer for row in comparison.candidates for layer in row.layers)
    return tuple(dict.fromkeys(layer.stored for layer in layers))


def layer_chart(row: Row, formats: Sequence[str]) -> LayerChart | None:
    """Lay a file's chart out; None where its weights were not compared."""
    if not row.layers:
        return None
    index = {name: at for at, name in enumerate(formats)}
    known = [layer.error for layer in row.layers if math.isfinite(layer.error)]
    step, most = _scale(max(known, default=0.0))
    ranked = sorted(range(len(row.layers)), key=lambda at: -_badness(row.layers[at]))
    ranks = {at: n + 1 for n, at in enumerate(ranked[:_WORST]) if _badness(row.layers[at]) > 0}
    count = len(row.layers)

    def down(error: float) -> float:
        if not math.isfinite(error):
            return _RAIL
        return round(_BOTTOM - error / most * (_BOTTOM - _TOP), 1)

    dots = tuple(
        Dot(
            at,
            round(1 + 98 * (at + 0.5) / count, 2),
            down(layer.error),
            index[layer.stored],
            f"{layer.key}: {layer.stored}, error {number_text(layer.error, 4)}"
            + (f", {size_text(layer.nbytes)}" if layer.nbytes else ""),
            ranks.get(at, 0),
            layer,
        )
        for at, layer in enumerate(row.layers)
    )
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = tuple((down(n * step), f"{n * step:.{digits}f}") for n in range(round(most / step) + 1))
    stored = [layer.stored for layer in row.layers]
    return LayerChart(
        row=row,
        dots=dots,
        ticks=ticks,
        bands=_bands(row.layers),
        formats=tuple((index[name], name, stored.count(name)) for name in dict.fromkeys(stored)),
        worst=tuple(sorted((dot for dot in dots if dot.rank), key=lambda dot: dot.rank)),
        rail_y=_RAIL if len(known) < count else None,
    )


def _badness(layer: LayerError) -> float:
    return layer.error if math.isfinite(layer.error) else math.inf


def _scale(most: float) -> tuple[float, float]:
    """A step of 1, 2 or 5 times a power of ten, and the axis' end: at most five steps."""
    rough = max(most / 4, 1e-6)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    return step, step * max(1, math.ceil(most / step - 1e-9))


def _bands(layers: Sequence[LayerError]) -> tuple[Band, ...]:
    heads = [layer.key.split(".")[0] for layer in layers]
    runs = [(head, len(list(run))) for head, run in groupby(heads)]
    if len(runs) > _BANDS:
        return ()
    bands, at = [], 0
    for head, length in runs:
        x = 1 + 98 * at / len(layers)
        bands.append(Band(round(x, 2), round(98 * length / len(layers), 2), head))
        at += length
    return tuple(bands)
