"""Importance matrices in llama.cpp's older file, `.dat`: little-endian, no magic number.

::

    i32 entries
    entries:  i32 bytes  name   i32 calls   i32 values   f32 mean * calls [values]
    i32 chunks, i32 bytes  dataset                          both, the first alone, or neither

Every count and length is held against the bytes the file has left before anything is allocated
for it. One count stands for a whole weight: the calls, or chunks, that it was measured in.

Sources: ggml-org/llama.cpp@42ea59b:tools/quantize/quantize.cpp, load_legacy_imatrix;
ggml-org/llama.cpp@006e7ef:tools/imatrix/imatrix.cpp, save_imatrix_legacy;
leejet/stable-diffusion.cpp@143515a:src/runtime/imatrix.cpp, save_imatrix (no dataset).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from diffquant.core.errors import MalformedFile, TruncatedFile
from diffquant.io.atomic import FlatSink
from diffquant.io.importance import Entry, ImportanceMatrix, checked_values
from diffquant.io.reading import RandomFile

__all__ = ["check_legacy", "read_legacy", "write_legacy"]

_MAX_NAME_NBYTES = 4096
_MAX_CALLS = 2**31 - 1
_MIN_ENTRY_NBYTES = 4 + 1 + 4 + 4 + 4  # one letter, one value


class _Cursor:
    """Walks a legacy file; every length is checked against what is left."""

    def __init__(self, file: RandomFile) -> None:
        self.file = file
        self.position = 0

    @property
    def left(self) -> int:
        """Bytes after the position."""
        return self.file.size - self.position

    def skip(self, nbytes: int, what: str) -> int:
        """Step over `nbytes` and return where they begin."""
        if nbytes > self.left:
            raise TruncatedFile(
                f"{what} ends at byte {self.position + nbytes}, the file has {self.file.size}",
                path=self.file.path,
            )
        begin = self.position
        self.position += nbytes
        return begin

    def i32(self, what: str) -> int:
        """Return the next signed number."""
        begin = self.skip(4, what)
        return int.from_bytes(self.file.read(begin, 4).tobytes(), "little", signed=True)

    def text(self, nbytes: int, what: str) -> str:
        """Return the next `nbytes` bytes as text."""
        begin = self.skip(nbytes, what)
        try:
            return self.file.read(begin, nbytes).tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error}") from None

    def fail(self, message: str) -> MalformedFile:
        """Build an error that names the file."""
        return MalformedFile(message, path=self.file.path)


def _walk_legacy(cursor: _Cursor) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, calls, first byte of the values, values) per entry; the tail is left."""
    count = cursor.i32("number of entries")
    if count < 1 or count * _MIN_ENTRY_NBYTES > cursor.left:
        raise cursor.fail(
            f"not an importance matrix: no GGUF, and its first number, {count}, is not a number of "
            f"entries that {cursor.left} bytes can hold"
        )
    seen: set[str] = set()
    for index in range(count):
        length = cursor.i32(f"name length of entry {index}")
        if not 0 < length <= _MAX_NAME_NBYTES:
            raise cursor.fail(
                f"name of entry {index} has {length} bytes, expected 1 to {_MAX_NAME_NBYTES}"
            )
        name = cursor.text(length, f"name of entry {index}")
        if name in seen:
            raise cursor.fail(f"entry {name!r} appears twice")
        seen.add(name)
        calls = cursor.i32(f"calls of {name!r}")
        values = cursor.i32(f"number of values of {name!r}")
        if calls < 0 or values < 1:
            raise cursor.fail(f"{name!r} has {values} values from {calls} calls")
        yield name, calls, cursor.skip(4 * values, f"values of {name!r}"), values


def _legacy_tail(cursor: _Cursor, most_calls: int) -> tuple[int, tuple[str, ...]]:
    """Chunks and dataset; sd.cpp writes the first alone, the oldest files neither."""
    if not cursor.left:
        return most_calls, ()
    chunks = cursor.i32("number of chunks")
    if chunks < 0:
        raise cursor.fail(f"number of chunks is {chunks}")
    datasets: tuple[str, ...] = ()
    if cursor.left:
        length = cursor.i32("length of the dataset's name")
        if length < 0:
            raise cursor.fail(f"the dataset's name has {length} bytes")
        name = cursor.text(length, "the dataset's name")
        datasets = (name,) if name else ()
    if cursor.left:
        raise cursor.fail(f"{cursor.left} bytes follow the last field")
    return chunks or most_calls, datasets


def check_legacy(file: RandomFile) -> None:
    """Walk the structure without reading values.

    Raises:
        TruncatedFile, MalformedFile: this is no legacy importance matrix.
    """
    cursor = _Cursor(file)
    for _ in _walk_legacy(cursor):
        pass
    _legacy_tail(cursor, 0)


def read_legacy(file: RandomFile) -> ImportanceMatrix:
    """Read a legacy file.

    Raises:
        TruncatedFile, MalformedFile: the file breaks a rule of the layout.
    """
    cursor = _Cursor(file)
    entries: dict[str, Entry] = {}
    most = 0
    for name, calls, begin, count in _walk_legacy(cursor):
        values = file.read(begin, 4 * count).view("<f4")
        checked_values(values, name, "values", file.path)
        # llama-quantize takes the values of an entry without calls as they are
        counts = np.array([max(calls, 1)], np.int64)
        entries[name] = Entry(values.astype(np.float64).reshape(1, -1), counts)
        most = max(most, calls)
    chunks, datasets = _legacy_tail(cursor, most)
    return ImportanceMatrix(entries, datasets, chunks, legacy=True, files=(file.path.name,))


def write_legacy(path: Path, matrix: ImportanceMatrix, *, force: bool) -> None:
    """Write a legacy file; see `write_imatrix` for what it loses."""
    parts = [struct.pack("<i", len(matrix.entries))]
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        raw = name.encode()
        calls = min(-(-int(entry.counts.max()) // matrix.chunk_size), _MAX_CALLS) or 1
        values = entry.values() * np.float32(calls)
        parts += (struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, values.size))
        parts.append(values.astype("<f4").tobytes())
    dataset = matrix.datasets[-1].encode() if matrix.datasets else b""
    parts.append(struct.pack("<ii", min(matrix.chunk_count, _MAX_CALLS), len(dataset)) + dataset)
    content = b"".join(parts)
    sink = FlatSink(
        path,
        extents={},
        nbytes=len(content),
        metadata={},
        render=lambda _: content,
        force=force,
    )
    with sink:
        sink.commit()
