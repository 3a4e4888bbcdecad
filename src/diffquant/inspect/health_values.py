"""Decode every weight of a file once, in chunks of rows, and note what its numbers look like.

Several threads, in file order, interleaved with the hashing of the files, so that a byte comes from
the disk once and a second time from the page cache.

Memory: a chunk is about a million weights (`CHUNK`), 4 MiB decoded and as much again as bytes and
masks; with one hash window that is some 24 MiB a thread. A weight whose single row is larger than
`MAX_ROW` is not looked at, and said so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffquant.convert.logical import LogicalSource, LogicalTensor
from diffquant.convert.workers import Task, run_tasks
from diffquant.core.errors import CheckpointError, QuantError
from diffquant.core.floats import PLAIN_FLOATS, float32_of
from diffquant.core.heap import keep_freed_pages
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.inspect.hashes import FileHasher, FileHashes, weight_files
from diffquant.inspect.weight_stats import ChunkStats, WeightStats, chunk_stats, combine
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS, matrix_shape

__all__ = ["CHUNK", "MAX_ROW", "Values", "look_at_values"]

CHUNK = 1 << 20  # weights decoded at once
MAX_ROW = 1 << 28  # weights: a gibibyte of float32
_MAX_SIDE = 1 << 24


@dataclass(frozen=True, slots=True)
class Values:
    """What was seen.

    Attributes:
        stats: key -> numbers of every weight that could be decoded, and of floating point tensors
            that stand beside weights.
        skipped: key -> why it was not looked at.
        hashes: of the files, in order.
    """

    stats: Mapping[str, WeightStats]
    skipped: Mapping[str, str]
    hashes: tuple[FileHashes, ...]


@dataclass(slots=True)
class _Found:
    """Chunks come in any order and are put in theirs at the end."""

    rows: int
    chunks: dict[int, ChunkStats] = field(default_factory=dict)


def look_at_values(
    logical: LogicalSource, *, workers: int = 1, progress: Progress = NO_PROGRESS
) -> Values:
    """Decode all weights and hash all files.

    Raises:
        CheckpointError: the file cannot be read.
    """
    skipped: dict[str, str] = {}
    found: dict[str, _Found] = {}
    _load_decoders(logical)
    hashers: list[FileHasher] = []
    try:
        hashers += [FileHasher(path) for path in weight_files(logical.source)]
        weights = sum(spec.nbytes for spec in logical.source.specs.values())
        progress.start("check", weights + sum(one.nbytes for one in hashers))
        tasks = _interleave(
            _value_tasks(logical, found, skipped, progress),
            (task for one in hashers for task in one.tasks(progress)),
        )
        with keep_freed_pages():
            run_tasks(tasks, workers)
        hashes = tuple(one.result() for one in hashers)
    finally:
        progress.stop()
        for one in hashers:
            one.close()
    stats = {
        key: combine((seen.chunks[at] for at in sorted(seen.chunks)), rows=seen.rows)
        for key, seen in found.items()
        if key not in skipped
    }
    return Values(stats, skipped, hashes)


def _load_decoders(logical: LogicalSource) -> None:
    """Import what decodes the file's formats, once, before several threads want it at once."""
    for name in {tensor.format for tensor in logical.tensors.values() if tensor.format}:
        backend(FORMATS[name].codec, "decode")


def _interleave(values: Iterator[Task], hashes: Iterator[Task]) -> Iterator[Task]:
    """Two streams that each follow the file; hashing is the slower one and goes first."""
    streams = [hashes, values]
    while streams:
        for stream in tuple(streams):
            task = next(stream, None)
            if task is None:
                streams.remove(stream)
            else:
                yield task


def _value_tasks(
    logical: LogicalSource, found: dict[str, _Found], skipped: dict[str, str], progress: Progress
) -> Iterator[Task]:
    for key, tensor in logical.tensors.items():
        n, k = matrix_shape(tensor.shape)
        why = _unreadable(tensor, k)
        if why:
            skipped[key] = why
            progress.advance(logical.source.specs[key].nbytes, key)
            continue
        if not n * k:
            continue
        found[key] = _Found(n)
        step = _rows_per_chunk(tensor, n, k)
        read = functools.partial(logical.read, key)
        for at, start in enumerate(range(0, n, step)):
            stop = min(start + step, n)
            nbytes = logical.source.specs[key].nbytes * (stop - start) // n
            look = functools.partial(read, (start, stop))
            yield functools.partial(_look, key, at, look, found, skipped, progress, nbytes)
    for key in _beside(logical):
        found[key] = _Found(1)
        look = functools.partial(_read_beside, logical, key)
        nbytes = logical.source.specs[key].nbytes
        yield functools.partial(_look, key, 0, look, found, skipped, progress, nbytes)


def _look(
    key: str,
    at: int,
    read: Callable[[], NDArray[np.float32]],
    found: Mapping[str, _Found],
    skipped: dict[str, str],
    progress: Progress,
    nbytes: int,
) -> list[Task]:
    try:
        with np.errstate(all="ignore"):  # numbers that float32 cannot hold are a finding
            found[key].chunks[at] = chunk_stats(read())
    except CheckpointError:
        raise
    except QuantError as error:
        skipped[key] = str(error)
    progress.advance(nbytes, key)
    return []


def _unreadable(tensor: LogicalTensor, k: int) -> str:
    """Why a weight's numbers are not looked at; "" where they are."""
    if tensor.why:
        return tensor.why
    if not tensor.is_float:
        return f"{tensor.dtype} numbers are not weights"
    if k > MAX_ROW:
        return f"one row of {k} numbers: more than {MAX_ROW} are not decoded at once"
    return ""


def _rows_per_chunk(tensor: LogicalTensor, n: int, k: int) -> int:
    """About CHUNK weights, in whole tiles where scales belong to several rows."""
    step = max(CHUNK // max(k, 1), 1)
    multiple = FORMATS[tensor.format].row_multiple((n, k)) if tensor.format else 1
    return -(-step // multiple) * multiple


def _beside(logical: LogicalSource) -> Iterator[str]:
    """Small floating point tensors that belong to a weight and are no part of its numbers."""
    parts = {key for tensor in logical.tensors.values() for key in tensor.parts.values()}
    for key in logical.consumed:
        spec = logical.source.specs[key]
        if key not in parts and spec.dtype in PLAIN_FLOATS and 0 < spec.size <= _MAX_SIDE:
            yield key


def _read_beside(logical: LogicalSource, key: str) -> NDArray[np.float32]:
    return float32_of(logical.source.read(key), logical.source.specs[key].dtype).reshape(1, -1)
