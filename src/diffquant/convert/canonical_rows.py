"""Rows of a weight in another naming: pieces of several source tensors, decoded and put together.

The engine streams the same way from a plan's steps; this serves comparisons, which have no plan.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.logical import LogicalSource
from diffquant.convert.rules import Assignment
from diffquant.quant.formats import matrix_shape

__all__ = ["canonical_rows"]


def canonical_rows(
    logical: LogicalSource, assignment: Assignment, rows: tuple[int, int]
) -> NDArray[np.float32]:
    """Rows [start, stop) of a weight as (R, K) float32, whatever pieces it is stored in.

    A vector and a transposed matrix are read whole, everything else only where it is asked for.
    """
    n, k = matrix_shape(assignment.shape)
    if len(assignment.shape) < 2 or assignment.transpose:
        found = []
        for piece in assignment.pieces:
            values = logical.read(piece.key)
            shape = logical.tensors[piece.key].shape
            flat = values.reshape(shape[0] if shape else 1, -1)
            found.append(flat[piece.start : piece.stop])
        whole = np.concatenate(found)
        return (whole.T if assignment.transpose else whole).reshape(n, k)[rows[0] : rows[1]]
    found, at = [], 0
    for piece in assignment.pieces:
        length = piece.stop - piece.start
        start, stop = max(rows[0] - at, 0), min(rows[1] - at, length)
        if start < stop:
            found.append(logical.read(piece.key, (piece.start + start, piece.start + stop)))
        at += length
    return np.concatenate(found).reshape(rows[1] - rows[0], k)
