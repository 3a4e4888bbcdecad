"""Read rows of packed weights whose scales are those of many rows together, padded or not.

Rows are read by whole tiles and cut; dialects/padded.py has checked the sizes of the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.core.floats import float32_of
from diffquant.core.tensors import TensorSource
from diffquant.quant.backends import backend
from diffquant.quant.formats import format_named

__all__ = ["read_tiled"]


def read_tiled(
    source: TensorSource,
    fmt: str,
    keys: Mapping[str, str],
    shape: tuple[int, ...],
    rows: tuple[int, int],
) -> NDArray[np.float32]:
    """Decode a half-open range of rows of a weight of `shape`: (R, K) float32."""
    row = format_named(fmt)
    n, k = shape
    tile = row.row_multiple(shape)
    first, last = rows[0] // tile * tile, min(-(-rows[1] // tile) * tile, n)
    parts: dict[str, NDArray[Any]] = {}
    for part in row.parts:
        key = keys[part.name]
        if not part.per_row:
            parts[part.name] = _numbers(source, key, part.dtype).reshape(())
            continue
        # `first` ends a tile, so nothing before it is padded.
        span = part.shape((first, k))[0], part.shape((last, k))[0]
        raw = _numbers(source, key, part.dtype, span)
        parts[part.name] = raw.reshape(part.shape((last - first, k)))
    decoded: NDArray[np.float32] = backend(row.codec, "decode")(parts, (last - first, k), fmt=fmt)
    return decoded[rows[0] - first : rows[1] - first]


def _numbers(
    source: TensorSource, key: str, dtype: str, rows: tuple[int, int] | None = None
) -> NDArray[Any]:
    """Rows of a part as its numbers: some files hold float32 scales in 16 bits; bytes stay so."""
    raw = source.read(key, rows)
    if dtype == "F32":
        return float32_of(raw, source.specs[key].dtype)
    return raw.view("i1") if dtype == "I8" else raw
