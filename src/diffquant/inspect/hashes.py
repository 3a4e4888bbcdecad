"""The names that programs give a file: sha256, and the short hashes cut from it or from its data.

=======  ===================================================================================
sha256   of the whole file
AutoV1   first 8 digits of the sha256 of 64 KiB from byte 1 MiB on: the first web UIs' hash
AutoV2   first 10 digits of the sha256 of the file
AutoV3   first 12 digits of the sha256 of what follows a safetensors header: the same whatever
         a tool writes into the metadata
=======  ===================================================================================

A header can state the last one in full (`modelspec.hash_sha256`, `sshs_model_hash`); web UIs
believe the statement and look adapters up by it, so one that differs is worth a warning.

Bytes go by once, in file order, a window at a time; whole windows of zeros are noted on the way:
they are what a downloader leaves of a file that it laid out in advance and did not finish.

Sources: AUTOMATIC1111/stable-diffusion-webui@5929ece:modules/sd_models.py (model_hash, shorthash)
and @f2844bd:extensions-builtin/Lora/network.py (12 digits, `sshs_model_hash` first);
lllyasviel/stable-diffusion-webui-forge@cfa5242:modules/hashes.py (addnet_hash_safetensors);
Stability-AI/ModelSpec@02f6279:README.md (hash_sha256: "0x" and the hash of all tensor content);
the names are Civitai's: civitai/civitai issue 742, SwarmUI issue 26.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffquant.convert.workers import Task, default_workers, run_tasks
from diffquant.core.errors import CheckpointError
from diffquant.core.progress import NO_PROGRESS, Progress
from diffquant.core.tensors import ByteArray, TensorSource
from diffquant.io import open_source, safetensors
from diffquant.io.diffusers_folder import FolderSource
from diffquant.io.reading import RandomFile
from diffquant.io.sharded import ShardedSource

__all__ = [
    "EMPTY_SHA256",
    "FileHasher",
    "FileHashes",
    "StatedHash",
    "ZeroRange",
    "hash_paths",
    "weight_files",
]

SEGMENT_NBYTES = 8 << 20  # read and hashed at once
EMPTY_SHA256 = hashlib.sha256().hexdigest()
_WINDOW_NBYTES = 1 << 20
_OLD_START, _OLD_NBYTES = 0x100000, 0x10000
_STATED = ("modelspec.hash_sha256", "sshs_model_hash")
_HEAD_NBYTES = 64


@dataclass(frozen=True, slots=True)
class StatedHash:
    """A hash that a header states of the data below it; `said` as it is written there."""

    key: str
    said: str
    verdict: Literal["matches", "differs", "unreadable"]


@dataclass(frozen=True, slots=True)
class ZeroRange:
    """Bytes [start, stop) of a file that are all zero."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class FileHashes:
    """One file's hashes, lower-case hexadecimal; "" where a hash has no meaning for the file.

    Attributes:
        path: the file.
        nbytes: its size.
        sha256: of the whole file.
        data_sha256: of what follows a safetensors header.
        autov1, autov2, autov3: the short ones; see the module docstring.
        stated: what the header says of `data_sha256`.
        zeros: ranges of at least 1 MiB that hold nothing but zeros, in order.
    """

    path: str
    nbytes: int
    sha256: str
    data_sha256: str
    autov1: str
    autov2: str
    autov3: str
    stated: tuple[StatedHash, ...]
    zeros: tuple[ZeroRange, ...]


def weight_files(source: TensorSource) -> tuple[Path, ...]:
    """The local files that hold a source's tensors; none where they are not local."""
    if isinstance(source, FolderSource | ShardedSource):
        return source.weight_files
    return (source.path,) if source.path.is_file() else ()


def hash_paths(
    paths: Sequence[str | Path],
    *,
    workers: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> tuple[FileHashes, ...]:
    """Hash files, whatever they hold; of a folder or a shard index, its weight files.

    Args:
        paths: files and folders.
        workers: threads, one per processor where None; each holds at most two windows of 8 MiB.
        progress: told about bytes.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with contextlib.ExitStack() as stack:
        hashers = []
        for file in dict.fromkeys(one for path in paths for one in _files(Path(path))):
            hashers.append(FileHasher(file))
            stack.callback(hashers[-1].close)
        progress.start("hash", sum(one.nbytes for one in hashers))
        stack.callback(progress.stop)
        tasks = (task for one in hashers for task in one.tasks(progress))
        run_tasks(tasks, workers or default_workers())
        return tuple(one.result() for one in hashers)


def _files(path: Path) -> Sequence[Path]:
    """What to hash for a path."""
    if path.is_file() and not path.name.endswith(".json"):
        return (path,)
    with open_source(path) as source:
        return weight_files(source)


class FileHasher:
    """Hashes one file by tasks that a pool of threads may run beside others.

    Tasks are to be started in the order given; each waits for the one before it where it must, so
    that the two digests of one file can be taken by two threads.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            CheckpointError: it cannot be opened.
        """
        self._file = RandomFile(path)
        self.path = path
        self.nbytes = 0  # bytes that will be hashed, for progress
        self._data_start, self._stated = self._look(path)
        self._whole, self._data = _Lane(), _Lane()
        self._windows: list[int] = []
        self.nbytes = self._file.size * (1 if self._data_start is None else 2)

    def _look(self, path: Path) -> tuple[int | None, dict[str, str]]:
        """Where the data starts and what the header states; a broken header has neither."""
        file = self._file
        head = file.read(0, min(file.size, _HEAD_NBYTES)).tobytes()
        if not safetensors.sniff(path, head):
            return None, {}
        try:
            start, header = safetensors.read_header(file)
        except CheckpointError:
            return None, {}
        notes = header.get("__metadata__")
        known = notes if isinstance(notes, dict) else {}
        return start, {key: str(known[key]) for key in _STATED if key in known}

    def tasks(self, progress: Progress = NO_PROGRESS) -> Iterator[Task]:
        """Yield the work, in file order."""
        size = self._file.size
        for index, start in enumerate(range(0, size, SEGMENT_NBYTES)):
            stop = min(start + SEGMENT_NBYTES, size)
            yield functools.partial(self._take, index, start, stop, progress)
            if self._data_start is not None:
                yield functools.partial(self._take_data, index, start, stop, progress)

    def _take(self, index: int, start: int, stop: int, progress: Progress) -> list[Task]:
        raw = self._whole.update(index, self._file, start, stop)
        self._windows += _zero_windows(raw, start)
        progress.advance(stop - start, self.path.name)
        return []

    def _take_data(self, index: int, start: int, stop: int, progress: Progress) -> list[Task]:
        assert self._data_start is not None
        first = min(max(start, self._data_start), stop)
        self._data.update(index, self._file, first, stop)
        progress.advance(stop - start, self.path.name)
        return []

    def result(self) -> FileHashes:
        """What was found, once every task has run."""
        whole = self._whole.digest.hexdigest()
        data = "" if self._data_start is None else self._data.digest.hexdigest()
        size = self._file.size
        return FileHashes(
            path=str(self.path),
            nbytes=size,
            sha256=whole,
            data_sha256=data,
            autov1=self._old_hash(),
            autov2=whole[:10],
            autov3=data[:12],
            stated=tuple(StatedHash(k, v, _compare(v, data)) for k, v in self._stated.items()),
            zeros=_joined(sorted(self._windows), size),
        )

    def _old_hash(self) -> str:
        """AutoV1; of a file shorter than 1 MiB the web UIs hash nothing at all."""
        start = min(_OLD_START, self._file.size)
        part = self._file.read(start, min(_OLD_NBYTES, self._file.size - start))
        return hashlib.sha256(part.data).hexdigest()[:8] if part.size else ""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Lane:
    """A digest that several threads update, each when its turn comes."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._next = 0
        self._broken = False
        self._turn = threading.Condition()

    def update(self, index: int, file: RandomFile, start: int, stop: int) -> ByteArray:
        """Read bytes [start, stop) and add them to the digest when segment `index` is due."""
        try:
            raw = file.read(start, stop - start)
        except BaseException:
            self._pass_on(broken=True)  # or those that wait for this segment wait for ever
            raise
        with self._turn:
            self._turn.wait_for(lambda: self._broken or self._next == index)
        if not self._broken:
            self.digest.update(raw.data)
        self._pass_on()
        return raw

    def _pass_on(self, *, broken: bool = False) -> None:
        with self._turn:
            self._next += 1
            self._broken |= broken
            self._turn.notify_all()


def _compare(said: str, found: str) -> Literal["matches", "differs", "unreadable"]:
    text = said.strip().lower().removeprefix("0x")
    if len(text) < 8 or any(char not in "0123456789abcdef" for char in text):
        return "unreadable"
    return "matches" if found.startswith(text) else "differs"


def _zero_windows(raw: ByteArray, start: int) -> list[int]:
    """First bytes of the whole windows in a segment that hold only zeros."""
    found = []
    for first in range(0, raw.size, _WINDOW_NBYTES):
        window = raw[first : first + _WINDOW_NBYTES]
        if not window[:64].any() and not window.any():  # almost always decided by 64 bytes
            found.append(start + first)
    return found


def _joined(windows: Sequence[int], size: int) -> tuple[ZeroRange, ...]:
    """Join neighbouring windows; a last one that is shorter counts with those before it."""
    ranges: list[ZeroRange] = []
    for start in windows:
        stop = min(start + _WINDOW_NBYTES, size)
        if ranges and ranges[-1].stop == start:
            ranges[-1] = ZeroRange(ranges[-1].start, stop)
        else:
            ranges.append(ZeroRange(start, stop))
    return tuple(one for one in ranges if one.nbytes >= _WINDOW_NBYTES)
