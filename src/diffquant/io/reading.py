"""Open files read by position, and the source whose tensors are byte ranges of one file.

Files are read with `preadv`, not mapped: several threads read at once without a lock, a file that
shrinks under us is an error instead of a SIGBUS, peak memory is what was asked for and not what the
kernel happened to map, and Windows can replace the file once it is closed.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from diffquant.core.errors import (
    CheckpointError,
    MalformedFile,
    MissingKeys,
    PlanMismatch,
    TruncatedFile,
    closest,
)
from diffquant.core.tensors import ByteArray, Closing, TensorSpec

__all__ = [
    "FlatSource",
    "RandomFile",
    "RemotePlace",
    "check_end",
    "checked_shape",
    "expect_files",
    "find_spec",
    "open_random",
    "row_extent",
]

_MAX_DIMS = 32
_MAX_ELEMENTS = 2**62


class RandomFile:
    """A file opened for reading at any offset, from any thread."""

    __slots__ = ("_file", "_lock", "path", "size")
    remote = False  # whether a read is a request

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise CheckpointError("no such file", path=path) from None
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror}", path=path) from error
        self.size = os.fstat(self._file.fileno()).st_size
        self._lock = threading.Lock()

    def read(self, offset: int, nbytes: int) -> ByteArray:
        """Return `nbytes` bytes from `offset` as a flat, read-only array of its own.

        Raises:
            TruncatedFile: the file ends before offset + nbytes.
            CheckpointError: the file is closed, or the disk reports an error.
        """
        self.check_inside(offset, nbytes)
        array = np.empty(nbytes, np.uint8)
        view = array.data
        try:
            done = 0
            while done < nbytes:
                count = self._read_into(view[done:], offset + done)
                if not count:
                    raise TruncatedFile(
                        f"ends at byte {offset + done}, it had {self.size} when it was opened",
                        path=self.path,
                    )
                done += count
        except ValueError:
            raise CheckpointError("read after close", path=self.path) from None
        except OSError as error:
            raise CheckpointError(f"read failed: {error.strerror}", path=self.path) from error
        array.flags.writeable = False
        return array

    def check_inside(self, offset: int, nbytes: int) -> None:
        """Refuse bytes that the file does not have, before anything is allocated.

        Raises:
            TruncatedFile: the file ends before offset + nbytes.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise TruncatedFile(
                f"bytes {offset} to {offset + nbytes} asked for, the file has {self.size}",
                path=self.path,
            )

    def expect(self, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int]) -> None:
        """Announce the tensors that will be read; a disk has no use for it."""

    def _read_into(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:  # Windows has no positional read
            self._file.seek(offset)
            return self._file.readinto(view) or 0

    def close(self) -> None:
        """Close the file; harmless when closed."""
        self._file.close()


@runtime_checkable
class RemotePlace(Protocol):
    """A path that lies elsewhere and knows how it is read: remote_path.RemotePath.

    The readers of containers are told apart from it here, so that none of them loads a network.
    """

    def open_random(self) -> RandomFile:
        """Open it for reading at any offset."""
        ...

    def held(self) -> AbstractContextManager[None]:
        """Keep its connections while the context lasts."""
        ...

    def expect_files(self, names: Iterable[str]) -> None:
        """Announce files in it that will be opened."""
        ...


def open_random(path: Path) -> RandomFile:
    """Open a file for reading at any offset, wherever it lies.

    Raises:
        CheckpointError: it cannot be opened.
    """
    return path.open_random() if isinstance(path, RemotePlace) else RandomFile(path)


def expect_files(folder: Path, names: Iterable[str]) -> None:
    """Announce files of a folder that will be opened; a disk has no use for it."""
    if isinstance(folder, RemotePlace):
        folder.expect_files(names)


def find_spec(specs: Mapping[str, TensorSpec], key: str, path: Path) -> TensorSpec:
    """Look a key up.

    Raises:
        MissingKeys: the source has no such tensor.
    """
    spec = specs.get(key)
    if spec is None:
        near = closest(key, specs)
        hint = f", did you mean {near!r}?" if near else ""
        raise MissingKeys(f"{path}: no tensor {key!r}{hint}", keys=(key,))
    return spec


def row_extent(spec: TensorSpec, rows: tuple[int, int] | None) -> tuple[int, int]:
    """Turn a half-open range of rows into (first byte, bytes) inside the tensor.

    Raises:
        PlanMismatch: the range does not lie inside the tensor.
    """
    if rows is None:
        return 0, spec.nbytes
    start, stop = rows
    if not 0 <= start <= stop <= spec.rows:
        raise PlanMismatch(f"{spec.key}: rows {start}:{stop} asked for, the tensor has {spec.rows}")
    return start * spec.row_nbytes, (stop - start) * spec.row_nbytes


def checked_shape(dims: object, key: str, path: Path) -> tuple[int, ...]:
    """Check that `dims` is a list of plausible dimensions, outermost first.

    Raises:
        MalformedFile: a dimension that is no integer >= 0, too many, or a product over 2**62.
    """
    if not isinstance(dims, list | tuple) or len(dims) > _MAX_DIMS:
        raise MalformedFile(
            f"shape of {key!r} is no list of at most {_MAX_DIMS} dimensions", path=path
        )
    for dim in dims:
        if type(dim) is not int or not 0 <= dim < _MAX_ELEMENTS:
            raise MalformedFile(f"shape of {key!r} has a bad dimension {dim!r:.40}", path=path)
    if math.prod(dims) >= _MAX_ELEMENTS:
        raise MalformedFile(f"shape of {key!r} is too large: {list(dims)}", path=path)
    return tuple(dims)


def check_end(
    specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], file: RandomFile
) -> None:
    """Check that every tensor ends inside the file; offsets count from its start.

    Raises:
        TruncatedFile: says which tensors are cut and how many bytes are missing.
    """
    ends = {key: offsets[key] + spec.nbytes for key, spec in specs.items() if spec.nbytes}
    end = max(ends.values(), default=0)
    if end <= file.size:
        return
    cut = tuple(sorted((key for key in ends if ends[key] > file.size), key=offsets.__getitem__))
    raise TruncatedFile(
        f"its header is whole, {len(cut)} of {len(specs)} tensors are not: the first that is cut "
        f"is {cut[0]!r}; {end} bytes expected, the file has {file.size}, {end - file.size} are "
        "missing: download it again",
        path=file.path,
        cut=cut,
        missing_nbytes=end - file.size,
    )


class FlatSource(Closing):
    """A TensorSource whose tensors are byte ranges of one open file."""

    def __init__(
        self,
        file: RandomFile,
        container: str,
        *,
        specs: Mapping[str, TensorSpec],
        offsets: Mapping[str, int],
        metadata: Mapping[str, Any],
    ) -> None:
        self.path = file.path
        self.container = container
        self.specs: Mapping[str, TensorSpec] = specs
        self.metadata: Mapping[str, Any] = metadata
        self.configs: Mapping[str, Any] = {}
        self.nbytes = file.size
        self.offsets = offsets
        self._file = file
        file.expect(specs, offsets)

    def read(self, key: str, rows: tuple[int, int] | None = None) -> ByteArray:
        """Return the bytes of `rows` (half open; all when None) as a flat, read-only array."""
        start, nbytes = row_extent(find_spec(self.specs, key, self.path), rows)
        return self._file.read(self.offsets[key] + start, nbytes)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
