"""Writing a file that exists only when it is whole, and the sink built on it.

The bytes go to `.<name>.partial-<pid>-<random>` beside the target. Its final size is reserved
first, so a full disk shows before the work. `commit` checks that every byte came, syncs, and
renames over the target. An exception removes the partial file; after kill -9 it stays, and is
removed when the same target is opened for writing again and its process is gone. An older file
under the target's name is never touched before the rename.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffquant.core.errors import (
    CheckpointError,
    DuplicateTarget,
    PlanMismatch,
    ResourceError,
    UsageError,
    shorten,
)
from diffquant.core.tensors import Aborting, ByteArray, TensorSpec

__all__ = [
    "FlatSink",
    "PartialFile",
    "check_disk",
    "check_parent",
    "disk_errors",
    "partial_path",
    "remove_stale",
    "sync_folder",
    "unique_specs",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def partial_path(target: Path, kind: str = "partial") -> Path:
    """Name a hidden sibling of `target` that tells which process owns it."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{os.urandom(4).hex()}")


def check_parent(target: Path) -> None:
    """Check that the target's folder exists.

    Raises:
        UsageError: it does not.
    """
    if not target.parent.is_dir():
        raise UsageError(f"{target}: folder {target.parent} does not exist, create it first")


def check_disk(target: Path, nbytes: int) -> None:
    """Check that `nbytes` more bytes fit beside `target`.

    Raises:
        ResourceError: they do not; the message has both numbers.
    """
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        raise ResourceError(
            f"{target}: needs {nbytes} bytes, {free} bytes are free in {target.parent}: "
            f"free {nbytes - free} bytes or write elsewhere"
        )


def remove_stale(target: Path) -> None:
    """Remove partial files and folders of `target` whose process is gone.

    A folder moved aside by a process that died between its two renames is moved back when nothing
    has taken its name.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|old)-(\d+)-[0-9a-f]{8}")
    for entry in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or _is_alive(int(match[2])):
            continue
        with contextlib.suppress(OSError):  # another process may be cleaning too
            if match[1] == "old" and not target.exists():
                entry.rename(target)
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _is_alive(pid: int) -> bool:
    import psutil  # here: only the rare leftover needs it

    return bool(psutil.pid_exists(pid))


@contextlib.contextmanager
def disk_errors(target: Path, nbytes: int) -> Iterator[None]:
    """Turn a full disk into ResourceError and other write errors into CheckpointError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"{target}: disk full while writing {nbytes} bytes ({error.strerror}): "
                f"free some space in {target.parent} or write elsewhere"
            ) from error
        raise CheckpointError(f"cannot be written: {error.strerror}", path=target) from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where folders can be synced."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PartialFile:
    """The temporary file: reserved at once, written by position, renamed by `commit`."""

    __slots__ = ("_descriptor", "_lock", "_path", "nbytes", "target")

    def __init__(self, target: Path, nbytes: int) -> None:
        self.target = target
        self.nbytes = nbytes
        self._lock = threading.Lock()
        self._path, self._descriptor = self._open()
        try:
            with disk_errors(target, nbytes):
                self._reserve()
        except BaseException:
            self.abort()
            raise

    def _open(self) -> tuple[Path, int]:
        check_disk(self.target, self.nbytes)
        path = partial_path(self.target)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with disk_errors(self.target, self.nbytes):
            return path, os.open(path, flags, 0o666)

    def _reserve(self) -> None:
        if self.nbytes and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, self.nbytes)
                return
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise
        os.truncate(self._descriptor, self.nbytes)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`; thread-safe."""
        with disk_errors(self.target, self.nbytes):
            done = 0
            while done < len(data):
                done += self._write_some(offset + done, data[done:])

    def _write_some(self, offset: int, data: memoryview) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._descriptor, data, offset)
        with self._lock:  # Windows has no positional write
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, data)

    def flush(self) -> None:
        """Wait until what was written is on the disk."""
        with disk_errors(self.target, self.nbytes):
            getattr(os, "fdatasync", os.fsync)(self._descriptor)

    def commit(self) -> None:
        """Sync and rename over the target.

        The file stays open across the rename, where an open file can be renamed: a lock on it
        (io/kept.py) must not end before.
        """
        with disk_errors(self.target, self.nbytes):
            os.fsync(self._descriptor)
            if os.name == "nt":
                self._close()
            self._path.replace(self.target)
            self._close()
            sync_folder(self.target.parent)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def abort(self) -> None:
        """Close and remove; harmless after a commit."""
        self._close()
        self._path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what was written, also where `abort` would keep it (io/kept.py)."""
        self.abort()


def unique_specs(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return the specs as a tuple.

    Raises:
        DuplicateTarget: two of them have the same key.
    """
    seen: set[str] = set()
    found = tuple(specs)
    twice = [spec.key for spec in found if spec.key in seen or seen.add(spec.key)]  # type: ignore[func-returns-value]
    if twice:
        raise DuplicateTarget(f"planned twice: {shorten(twice)}", keys=tuple(twice))
    return found


class FlatSink(Aborting):
    """A TensorSink that is one file: a header, then tensors at offsets known beforehand."""

    def __init__(
        self,
        path: Path,
        *,
        extents: Mapping[str, tuple[int, int]],
        nbytes: int,
        metadata: Mapping[str, Any],
        render: Callable[[Mapping[str, Any]], bytes],
        force: bool,
        file: Callable[[Path, int], PartialFile] = PartialFile,
    ) -> None:
        """Reserve the file and write its header.

        Args:
            path: the target.
            extents: key -> (offset in the file, bytes).
            nbytes: size of the whole file.
            metadata: what `render` takes; strings in it can be patched.
            render: returns the header's bytes for a given metadata.
            force: whether an existing target may be replaced.
            file: opens the temporary file, given the target and its size.
        """
        check_parent(path)
        remove_stale(path)
        if path.exists() and not force:
            raise UsageError(f"{path}: exists already, pass --force to replace it")
        self.path = path
        self.nbytes = nbytes
        self._extents = extents
        self._metadata = dict(metadata)
        self._render = render
        self._written = dict.fromkeys(extents, 0)
        self._lock = threading.Lock()
        self._state = "open"
        self._header = render(metadata)
        self._file = file(path, nbytes)
        try:
            self._file.write(0, memoryview(self._header))
            self._blank_gaps()
        except BaseException:
            self.abort()
            raise

    def _blank_gaps(self) -> None:
        """Write the zeros between tensors: a kept file holds whatever it was left with."""
        at = len(self._header)
        for offset, nbytes in sorted(self._extents.values()):
            if offset > at:
                self._file.write(at, memoryview(bytes(offset - at)))
            at = offset + nbytes
        if self.nbytes > at:
            self._file.write(at, memoryview(bytes(self.nbytes - at)))

    def write(self, key: str, offset: int, data: ByteArray) -> None:
        """Write bytes at `offset` inside the tensor `key`.

        Raises:
            PlanMismatch: no such tensor, or the bytes do not lie inside it.
            ResourceError: the disk is full.
        """
        self._check_open()
        extent = self._extents.get(key)
        if extent is None:
            raise PlanMismatch(f"{self.path}: tensor {key!r} was not planned")
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if offset < 0 or offset + flat.size > extent[1]:
            raise PlanMismatch(
                f"{self.path}: bytes {offset} to {offset + flat.size} written to {key!r}, "
                f"which has {extent[1]}"
            )
        self._file.write(extent[0] + offset, flat.data)
        with self._lock:
            self._written[key] += flat.size

    def mark_written(self, key: str) -> None:
        """Count a tensor as written whose bytes an earlier process left in the file."""
        self._check_open()
        self._written[key] = self._extents[key][1]

    def patch_metadata(self, key: str, value: str) -> None:
        """Replace a metadata string by another that takes exactly as many bytes.

        Raises:
            PlanMismatch: no such string, or the new one needs another number of bytes.
        """
        self._check_open()
        if not isinstance(self._metadata.get(key), str):
            raise PlanMismatch(f"{self.path}: no metadata string {key!r} to patch")
        with self._lock:
            patched = {**self._metadata, key: value}
            header = self._render(patched)
            if len(header) != len(self._header) or len(value) != len(self._metadata[key]):
                raise PlanMismatch(
                    f"{self.path}: metadata {key!r} patched with {len(value)} characters, "
                    f"{len(self._metadata[key])} are reserved"
                )
            self._file.write(0, memoryview(header))
            self._metadata, self._header = patched, header

    def commit(self) -> tuple[Path, ...]:
        """Check that every byte was written, sync, rename over the target.

        Raises:
            PlanMismatch: a tensor got fewer or more bytes than planned; nothing is renamed.
        """
        self._check_open()
        wrong = [
            f"{key!r} ({self._written[key]} of {nbytes} bytes)"
            for key, (_, nbytes) in self._extents.items()
            if self._written[key] != nbytes
        ]
        if wrong:
            raise PlanMismatch(f"{self.path}: not fully written: {shorten(wrong)}")
        self._file.commit()
        self._state = "committed"
        return (self.path,)

    def flush(self) -> None:
        """Wait until what was written is on the disk."""
        self._file.flush()

    def abort(self) -> None:
        """Remove what was written, or keep it (io/kept.py); harmless after a commit."""
        if self._state == "open":
            self._state = "aborted"
            self._file.abort()

    def discard(self) -> None:
        """Remove what was written, whatever kind of file it is in; harmless after a commit."""
        if self._state == "open":
            self._state = "aborted"
            self._file.discard()

    def _check_open(self) -> None:
        if self._state != "open":
            raise PlanMismatch(f"{self.path}: used after it was {self._state}")
