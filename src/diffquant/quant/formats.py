"""FORMATS: one frozen row per number format. Everything here is data; no array library is imported.

A row says which codec serves the format, which stored parts an encoded weight consists of (dtype
and shape of each as functions of the weight's shape, so every output size is known from specs
alone), and what it requires of a shape.

Adding a format: one codec file in `codecs/`, one row in `format_rows/` (docs/adding.md).
"""

from __future__ import annotations

from diffquant.core.errors import UnknownFormat
from diffquant.quant.format_rows import bitsandbytes, floats, ggml, integers, rotated, tiled
from diffquant.quant.layout import Importance, Part, QuantFormat, Requirement, matrix_shape

__all__ = [
    "FORMATS",
    "Importance",
    "Part",
    "QuantFormat",
    "Requirement",
    "format_named",
    "matrix_shape",
]

_FAMILIES = (floats, ggml, integers, rotated, bitsandbytes, tiled)

FORMATS: dict[str, QuantFormat] = {row.name: row for room in _FAMILIES for row in room.ROWS}


def format_named(name: str) -> QuantFormat:
    """Look a format up.

    Raises:
        UnknownFormat: with the known names and the closest.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise UnknownFormat(name, FORMATS) from None
