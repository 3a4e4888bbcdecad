"""How steps are cut into chunks of rows, and where each chunk lies in its output tensor.

Borders follow from shapes alone: every run of a plan cuts alike, whatever its number of workers, so
chunks can be hashed, checked and continued one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffquant.convert.adapters import WHOLE
from diffquant.convert.plan import Step
from diffquant.core.dtypes import storage_nbytes
from diffquant.quant.formats import format_named, matrix_shape

__all__ = ["CHUNK", "Extents", "chunk_extents", "chunks_of", "source_spans"]

CHUNK = 1 << 20  # weights per chunk: 4 MiB as float32, small enough for a core's cache share
Extents = tuple[tuple[int, int], ...]


def chunks_of(step: Step) -> Extents:
    """Row ranges of a step's chunks; one for all rows where a step cannot be cut."""
    shape = step.assignment.shape
    n, k = matrix_shape(shape)
    whole = step.assignment.transpose or any(a.reach == WHOLE for a in step.adapters)
    most = step.chunk or CHUNK
    if whole or n <= 1 or n * k <= most:
        return ((0, n),)
    multiple = step.row_multiple
    rows = max(most // k // multiple, 1) * multiple
    return tuple((start, min(start + rows, n)) for start in range(0, n, rows))


def chunk_extents(step: Step, key: str) -> Extents:
    """Byte range of every chunk inside the output tensor `key` of a step, in chunk order.

    Constants, whole-tensor parts and copied scales are written with the first chunk alone.
    """
    one = next(packed for packed in step.packed if packed.spec.key == key)
    chunks = chunks_of(step)
    if len(chunks) == 1 or not one.part or (step.copies_packed and one.part != "weight"):
        return ((0, one.spec.nbytes),)
    shape = step.assignment.shape
    name = _row_format(step)
    if not name:
        per_row = one.spec.nbytes // shape[0]
        return tuple((start * per_row, stop * per_row) for start, stop in chunks)
    part = next(p for p in format_named(name).parts if p.name == one.part)
    if not part.per_row:
        return ((0, one.spec.nbytes),)

    def upto(rows: int) -> int:
        return storage_nbytes(part.dtype, part.shape(step.stored_shape(rows))) if rows else 0

    return tuple((upto(start), upto(stop)) for start, stop in chunks)


def source_spans(step: Step, rows: tuple[int, int]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Cut the target's row range into row ranges of its pieces."""
    at = 0
    for piece in step.assignment.pieces:
        length = piece.stop - piece.start
        start, stop = max(rows[0] - at, 0), min(rows[1] - at, length)
        if start < stop or rows[0] == rows[1]:  # an empty tensor still has its row length
            yield piece.key, (piece.start + start, piece.start + stop)
        at += length


def _row_format(step: Step) -> str:
    """The format whose rows the output holds, "" where plain bytes are copied."""
    return step.decision.format or (step.stored if step.copies_packed else "")
