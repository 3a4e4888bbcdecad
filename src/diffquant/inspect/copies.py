"""Tensors of one file that hold the same bytes: tied weights written twice, EMA copies.

Statistics say which could be equal; only those are read again and compared.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffquant.convert.logical import LogicalSource
from diffquant.inspect.weight_stats import WeightStats

__all__ = ["find_copies"]

_FEW = 4096  # weights: below, equal tensors are equal initial values
_TRIED = 8  # tensors of equal statistics and different bytes that a further one is held against
_CHUNK_NBYTES = 1 << 22


def find_copies(logical: LogicalSource, stats: Mapping[str, WeightStats]) -> dict[str, str]:
    """Key of a copy -> key of the first tensor with its bytes; constant tensors are left out."""
    first: dict[tuple[object, ...], list[str]] = {}
    copies: dict[str, str] = {}
    for key, one in stats.items():
        if key not in logical.tensors or one.size < _FEW or one.low == one.high:
            continue
        spec = logical.source.specs[key]
        known = first.setdefault((spec.dtype, spec.shape, one), [])
        same = next((other for other in known if _equal(logical, other, key)), None)
        if same is not None:
            copies[key] = same
        elif len(known) < _TRIED:
            known.append(key)
    return copies


def _equal(logical: LogicalSource, one: str, other: str) -> bool:
    source = logical.source
    spec = source.specs[one]
    step = max(_CHUNK_NBYTES // max(spec.row_nbytes, 1), 1)
    return all(
        np.array_equal(source.read(one, span), source.read(other, span))
        for start in range(0, spec.rows, step)
        for span in ((start, min(start + step, spec.rows)),)
    )
