"""encode(): a weight into a format's parts, rounded as asked; what the engine calls.

nearest    the codec's own encoder, whose bytes other programs would write
search     the best scales, then the nearest level
feedback   the best scales, then error feedback
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffquant.quant.backends import backend
from diffquant.quant.codecs.arrays import Float32, Parts
from diffquant.quant.codecs.numba.rotation import rotate
from diffquant.quant.formats import FORMATS
from diffquant.quant.rounding.feedback import Carry, feedback_codes, nearest_codes
from diffquant.quant.rounding.levels import LEVELS
from diffquant.quant.rounding.packing import settle, spread, with_codes
from diffquant.quant.rounding.search import search_scales

__all__ = ["encode"]


def encode(
    weight: Float32,
    stats: Any = None,  # noqa: ANN401 - whatever the codec's reduce gives
    *,
    fmt: str,
    importance: Float32 | None = None,
    carry: Carry | None = None,
) -> Parts:
    """Encode rows with searched scales, and with error feedback where `carry` is given.

    Args:
        weight: (R, K) float32, C-contiguous, rows as the format's chunks need them.
        stats: as for the codec.
        fmt: a FORMATS name that has a row in LEVELS.
        importance: (K,) what an error weighs per column; with `carry`, its own are used; where
            columns are rotated, errors weigh alike without it.
        carry: of the layer's inputs, rotated as the format's rows are (`carry_of`).
    """
    row, shape = LEVELS[fmt], (weight.shape[0], weight.shape[1])
    parts: Parts = backend(FORMATS[fmt].codec, "encode")(weight, stats, fmt=fmt)
    if group := FORMATS[fmt].rotation:
        weight = rotate(weight, group)
        importance = None  # of columns that are mixed now; the carry's is of the rotated ones
    scales = np.empty(0, np.float32)
    if row.searches:
        weigh = carry.importance if carry is not None else importance
        scales, stored = search_scales(weight, parts, fmt, weigh)
        parts, scales = settle(scales, stored, parts, fmt)
    scale = spread(scales, parts, shape, fmt)
    if carry is not None:
        position = feedback_codes(weight, scale, carry, row)
    elif row.searches:
        position = nearest_codes(weight, scale, row)
    else:
        return parts
    return with_codes(row.codes[position], parts, fmt)
