"""Rows of a step's target, brought together from its pieces: as float32, or as stored bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.cutting import source_spans
from diffquant.convert.logical import LogicalSource
from diffquant.convert.plan import Step
from diffquant.core.tensors import ByteArray, TensorSource
from diffquant.quant.formats import matrix_shape

__all__ = ["float_rows", "raw_range", "raw_rows"]


def float_rows(logical: LogicalSource, step: Step, rows: tuple[int, int]) -> NDArray[np.float32]:
    """The target's rows as float32 (R, K), C-contiguous, adapters applied."""
    assignment = step.assignment
    _, k = matrix_shape(assignment.shape)
    if assignment.axis:
        weight = _slices(logical, step, rows).reshape(rows[1] - rows[0], k)
    elif len(assignment.shape) < 2 or assignment.transpose:
        weight = _whole(logical, step)
    else:
        found = [logical.read(key, span) for key, span in source_spans(step, rows)]
        weight = found[0] if len(found) == 1 else np.concatenate(found)
        weight = weight.reshape(rows[1] - rows[0], k)
    if step.adapters:
        weight = _adapted(step, weight, rows)
    return np.ascontiguousarray(weight, dtype=np.float32)


def _adapted(step: Step, weight: NDArray[np.float32], rows: tuple[int, int]) -> NDArray[np.float32]:
    """Apply adapters, to which a vector is a column."""
    shape = weight.shape
    if len(step.assignment.shape) < 2:
        weight, rows = weight.reshape(-1, 1), (0, weight.size)
    for adapter in step.adapters:
        weight = adapter.apply(weight, rows)
    return weight.reshape(shape)


def _slices(logical: LogicalSource, step: Step, rows: tuple[int, int]) -> NDArray[np.float32]:
    """One slice of a later axis, or several tensors stacked as one; rows stay rows."""
    axis, found = step.assignment.axis, []
    for piece in step.assignment.pieces:
        shape = logical.tensors[piece.key].shape
        whole = logical.read(piece.key, rows).reshape(rows[1] - rows[0], *shape[1:])
        found.append(whole)
    if len(found) > 1:
        return np.stack(found, axis)
    taken: NDArray[np.float32] = np.take(found[0], step.assignment.pieces[0].start, axis)
    return taken


def _whole(logical: LogicalSource, step: Step) -> NDArray[np.float32]:
    found = []
    for piece in step.assignment.pieces:
        tensor = logical.tensors[piece.key]
        if len(tensor.shape) < 2:
            found.append(logical.read(piece.key)[:, piece.start : piece.stop])
        else:
            found.append(logical.read(piece.key, (piece.start, piece.stop)))
    if len(step.assignment.shape) < 2:
        return np.concatenate([one.reshape(1, -1) for one in found], axis=1)
    return np.concatenate(found).T


def raw_rows(source: TensorSource, step: Step, rows: tuple[int, int]) -> ByteArray:
    """The target's rows as the source stores them, pieces one after another."""
    if len(step.assignment.shape) < 2 or step.assignment.transpose:
        return _raw_whole(source, step)
    found = [source.read(key, span) for key, span in source_spans(step, rows)]
    return found[0] if len(found) == 1 else np.concatenate(found)


def _raw_whole(source: TensorSource, step: Step) -> ByteArray:
    found = []
    for piece in step.assignment.pieces:
        spec = source.specs[piece.key]
        if len(spec.shape) < 2:
            width = spec.nbytes // max(spec.size, 1)
            found.append(source.read(piece.key)[piece.start * width : piece.stop * width])
        else:
            found.append(source.read(piece.key, (piece.start, piece.stop)))
    data = found[0] if len(found) == 1 else np.concatenate(found)
    if not step.assignment.transpose:
        return data
    columns, lines = step.assignment.shape
    width = data.size // max(columns * lines, 1)
    swapped = data.reshape(lines, columns, width).swapaxes(0, 1)
    return np.ascontiguousarray(swapped).reshape(-1)


def raw_range(source: TensorSource, key: str, start: int, stop: int) -> ByteArray:
    """Bytes [start, stop) of a physical tensor; rows are read alone where they are whole."""
    per_row = source.specs[key].row_nbytes
    if per_row and not start % per_row and not stop % per_row:
        return source.read(key, (start // per_row, stop // per_row))
    return source.read(key)[start:stop]
