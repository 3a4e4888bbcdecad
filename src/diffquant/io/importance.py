"""What an importance matrix holds, whatever file it comes from, and how several are merged.

An importance matrix says how strongly each input channel of a layer is driven: the mean of the
squared activations, one value per column of the weight, measured on real inputs. An encoder that
weighs errors by it spends its bits where the layer's output feels them.

Sources: ggml-org/llama.cpp@42ea59b:tools/quantize/quantize.cpp, load_imatrix;
ggml-org/llama.cpp@006e7ef:tools/imatrix/imatrix.cpp, load_imatrix, load_imatrix_legacy (merging).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import MalformedFile, UsageError

__all__ = ["Entry", "ImportanceMatrix", "checked_values", "merge_imatrices", "with_prefix"]

_MAX_COUNT = 2.0**53


@dataclass(frozen=True, slots=True)
class Entry:
    """What was measured for one weight.

    Attributes:
        sums: (matrices, K) float64, sums of squared activations; one matrix but for experts.
        counts: (matrices,) int64, rows (legacy: calls) that were summed.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    def values(self) -> NDArray[np.float32]:
        """Mean squares, (matrices * K,) float32, as llama-quantize computes them.

        A matrix that never saw an input counts as one in every column.
        """
        counts = self.counts.astype(np.float32)[:, None]
        sums = self.sums.astype(np.float32)
        means = sums / np.where(counts > 0, counts, np.float32(1))
        return np.where(counts > 0, means, np.float32(1)).reshape(-1)


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """An importance matrix.

    Attributes:
        entries: weight name -> measured values, as the file names weights.
        datasets: what the activations were measured on, in order.
        chunk_count: units of calibration data, 0 where the file does not say.
        chunk_size: rows per unit; 1 in legacy files, which count calls.
        legacy: whether counts are calls of unknown size.
        files: base names of the files it came from.
    """

    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 1
    legacy: bool = False
    files: tuple[str, ...] = ()

    @property
    def partial(self) -> tuple[str, ...]:
        """Entries of which a matrix never saw an input."""
        return tuple(name for name, one in self.entries.items() if not one.counts.all())


def merge_imatrices(matrices: Sequence[ImportanceMatrix]) -> ImportanceMatrix:
    """Add sums and counts, so that every row weighs the same wherever it was measured.

    Legacy files count calls. Beside GGUF files, a call counts as one chunk of the largest chunk
    size among those: sums and counts are multiplied by it, which leaves the means as they are.

    Raises:
        UsageError: no matrix, or two of them have different lengths for one weight.
    """
    if not matrices:
        raise UsageError("no importance matrix to merge")
    if len(matrices) == 1:
        return matrices[0]
    chunk_size = max(one.chunk_size for one in matrices)
    entries: dict[str, Entry] = {}
    for matrix in matrices:
        factor = chunk_size if matrix.legacy else 1
        for name, entry in matrix.entries.items():
            scaled = Entry(entry.sums * factor, entry.counts * factor)
            entries[name] = _add(name, entries[name], scaled) if name in entries else scaled
    return ImportanceMatrix(
        entries=entries,
        datasets=tuple(dict.fromkeys(name for one in matrices for name in one.datasets)),
        chunk_count=sum(one.chunk_count for one in matrices),
        chunk_size=chunk_size,
        legacy=all(one.legacy for one in matrices),
        files=tuple(name for one in matrices for name in one.files),
    )


def _add(name: str, one: Entry, other: Entry) -> Entry:
    if one.sums.size != other.sums.size:
        raise UsageError(
            f"{name}: {one.sums.size} values in one importance matrix, {other.sums.size} in "
            "another: they are of different models"
        )
    sizes = {one.counts.size, other.counts.size}
    if len(sizes) > 1:  # a legacy file has one count for all experts
        if 1 not in sizes:
            raise UsageError(f"{name}: counts of {sorted(sizes)} matrices cannot be merged")
        one, other = _spread(one, max(sizes)), _spread(other, max(sizes))
    return Entry(one.sums + other.sums, one.counts + other.counts)


def _spread(entry: Entry, size: int) -> Entry:
    return Entry(entry.sums.reshape(size, -1), np.broadcast_to(entry.counts, (size,)))


def with_prefix(matrix: ImportanceMatrix, prefix: str) -> ImportanceMatrix:
    """Put `prefix` before every weight's name: other programs look for other names."""
    return replace(matrix, entries={prefix + name: entry for name, entry in matrix.entries.items()})


def checked_values(values: NDArray[np.float32], name: str, what: str, path: Path) -> None:
    """Check what a file says was measured.

    Raises:
        MalformedFile: a value that is not finite or is negative, or a count nobody can reach.
    """
    limit = _MAX_COUNT if what == "counts" else float(np.finfo(np.float32).max)
    bad = ~((values >= 0) & (values <= limit))
    if bad.any():
        raise MalformedFile(
            f"{what} of {name!r} hold {values[bad][0]}, expected finite numbers from 0", path=path
        )
