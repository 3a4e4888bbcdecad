"""RemotePath: what the readers of containers use of a `pathlib.Path`, for files on a server.

It is a pair of a tree (one revision of a repository, or one web folder) and a path inside it, and
answers `is_file`, `iterdir`, `stat`, `open` and kin from the tree's listing and by range requests.
What needs a file of this machine (`open(path)`, `os.stat(path)`) raises a clear error.
"""

from __future__ import annotations

import io
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn, cast

import numpy as np

from diffquant.core.errors import CheckpointError, RemoteError
from diffquant.core.tensors import ByteArray, TensorSpec
from diffquant.io.ranges import RangeReader, Resource
from diffquant.io.reading import RandomFile
from diffquant.io.transport import Transport

__all__ = [
    "RemoteEntry",
    "RemoteFile",
    "RemotePath",
    "RemoteStat",
    "RemoteTree",
    "as_path",
]

_LOG = logging.getLogger(__name__)
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.\w+")
_MAX_READ_NBYTES = 64 << 20
_MARKER_NBYTES = 4096  # what `inspect` reads at most of a tensor
_SCALAR_NBYTES = 8
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class RemoteEntry:
    """A file as a listing has it.

    Attributes:
        path: inside the repository, slashes between.
        nbytes: size.
        sha256: of the content, "" where the listing has none (small files).
        blob_sha1: git's object id, "" where there is none.
    """

    path: str
    nbytes: int
    sha256: str = ""
    blob_sha1: str = ""


@dataclass(frozen=True, slots=True)
class RemoteStat:
    """The one field of `os.stat_result` that a listing knows."""

    st_size: int


class RemoteTree(ABC):
    """Where remote paths lie; its connections live while something in it is open.

    Attributes:
        asked: the file that the user named, "" for none.
        listed: the listing as far as it is known; empty before it was needed.
    """

    def __init__(self, transport: Transport, *, asked: str = "") -> None:
        self.transport = transport
        self.asked = asked
        self.listed: Mapping[str, RemoteEntry] = {}
        self._readers: dict[str, RangeReader] = {}
        self._holds = 0

    @abstractmethod
    def label(self, relative: str) -> str:
        """What a user calls a path in the tree."""

    @abstractmethod
    def listing(self) -> Mapping[str, RemoteEntry]:
        """Path -> entry of every file; empty where the server has no listing."""

    @abstractmethod
    def resource(self, relative: str) -> Resource:
        """How to ask for a file."""

    def make_reader(self, relative: str) -> RangeReader:
        """Begin to read a file.

        Raises:
            CheckpointError: what the resource makes of a refusal.
        """
        return RangeReader(self.resource(relative), self.transport)

    def missing(self, relative: str) -> str:
        """Say that a file is not there."""
        return f"there is no {relative!r}"

    def local(self, relative: str) -> Path | None:
        """The file as it lies in a cache of this machine, if it does."""
        return None

    def reader(self, relative: str) -> RangeReader:
        """The reader of a file, made once."""
        found = self._readers.get(relative)
        if found is None:
            found = self._readers[relative] = self.make_reader(relative)
        return found

    def warm(self, relatives: Iterable[str]) -> None:
        """Begin to read several files at once, those of no cache on this machine."""
        missing = [one for one in dict.fromkeys(relatives) if one not in self._readers]
        wanted = [one for one in missing if self.local(one) is None]
        if len(wanted) < 2:
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            self._readers |= zip(wanted, pool.map(self.make_reader, wanted), strict=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep connections and fetched blocks while the context lasts."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def hold(self) -> None:
        """Keep connections and fetched blocks until as many `release` have come."""
        self._holds += 1

    def release(self) -> None:
        """End one `hold`."""
        self._holds -= 1
        if not self._holds:
            self._readers.clear()
            self.transport.close()
            _LOG.info(
                "%s: %d requests, %d bytes fetched",
                self.label(self.asked), self.transport.requests, self.transport.nbytes,
            )  # fmt: skip


class RemoteFile(RandomFile):
    """A remote file as the readers of containers see any open file."""

    __slots__ = ("_announced", "_reader", "_tree")
    remote = True

    def __init__(self, path: RemotePath) -> None:
        self.path = as_path(path)
        self._announced: tuple[Mapping[str, TensorSpec], Mapping[str, int]] | None = None
        self._reader = path.tree.reader(path.relative)
        self.size = self._reader.size
        self._tree: RemoteTree | None = path.tree
        self._tree.hold()

    def read(self, offset: int, nbytes: int) -> ByteArray:
        """Return `nbytes` bytes from `offset` as a flat, read-only array of its own.

        Raises:
            TruncatedFile: the file ends before offset + nbytes.
            RemoteError: the server fails, or the file has changed.
            CheckpointError: the file is closed.
        """
        self.check_inside(offset, nbytes)
        if self._tree is None:
            raise CheckpointError("read after close", path=self.path)
        if nbytes <= _MARKER_NBYTES:
            self._tell_sorts()
        return np.frombuffer(self._reader.read(offset, nbytes), np.uint8)

    def expect(self, specs: Mapping[str, TensorSpec], offsets: Mapping[str, int]) -> None:
        """Announce the tensors of the file; nothing is looked up before a small one is read."""
        self._announced = specs, offsets

    def _tell_sorts(self) -> None:
        """Tell the reader what is read together: markers are, and so are scalars."""
        if self._announced is None:
            return
        (specs, offsets), self._announced = self._announced, None
        sizes = {key: spec.nbytes for key, spec in specs.items()}
        scalars = [key for key, size in sizes.items() if 0 < size <= _SCALAR_NBYTES]
        markers = [
            key
            for key, size in sizes.items()
            if _SCALAR_NBYTES < size <= _MARKER_NBYTES and specs[key].dtype == "U8"
        ]
        self._reader.expect(
            {offsets[key]: sizes[key] for key in sort} for sort in (markers, scalars)
        )

    def close(self) -> None:
        """Let go of the connection; harmless when closed."""
        tree, self._tree = self._tree, None
        if tree is not None:
            tree.release()


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A place in a tree; `relative` is "" for its root."""

    tree: RemoteTree
    relative: str = ""

    def __str__(self) -> str:
        return self.tree.label(self.relative)

    def to_json(self) -> str:
        """As reports print it."""
        return str(self)

    def __fspath__(self) -> NoReturn:
        raise CheckpointError(
            "only its header can be read from here: download it (diffquant download)", path=self
        )

    @property
    def name(self) -> str:
        """The last part, of the repository where there is no other."""
        return PurePosixPath(self.relative or self.tree.label("").partition("@")[0]).name

    @property
    def suffix(self) -> str:
        """What `pathlib` calls suffix."""
        return PurePosixPath(self.name).suffix if self.relative else ""

    @property
    def stem(self) -> str:
        """The name without suffix."""
        return self.name.removesuffix(self.suffix) if self.suffix else self.name

    @property
    def parent(self) -> RemotePath:
        """The folder around it; a root is its own."""
        head = self.relative.rpartition("/")[0]
        return RemotePath(self.tree, head)

    def __truediv__(self, name: str) -> RemotePath:
        joined = "/".join(part for part in (self.relative, name) if part)
        return RemotePath(self.tree, joined)

    def __lt__(self, other: RemotePath) -> bool:
        return self.relative < other.relative

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """The path from a folder above it."""
        return PurePosixPath(self.relative).relative_to(other.relative)

    def is_file(self) -> bool:
        """Tell whether it is a file. What was asked for, and shards, are believed to be there."""
        if not self.relative:
            return False
        if self.relative == self.tree.asked or _SHARD.fullmatch(self.name):
            return True  # else its reader says so, without a listing
        return self.relative in self.tree.listing()

    def is_dir(self) -> bool:
        """Tell whether it is the root, or files lie below it."""
        if not self.relative or self.relative == self.tree.asked:
            return not self.relative
        prefix = f"{self.relative}/"
        return any(path.startswith(prefix) for path in self.tree.listing())

    def exists(self) -> bool:
        """Tell whether it is a file or a folder."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what lies directly in it."""
        prefix = f"{self.relative}/" if self.relative else ""
        inside = (
            path.removeprefix(prefix).partition("/")[0]
            for path in self.tree.listing()
            if path.startswith(prefix)
        )
        for name in dict.fromkeys(inside):
            yield self / name

    def stat(self) -> RemoteStat:
        """Its size, from the listing where there is one."""
        entry = self.tree.listed.get(self.relative)
        return RemoteStat(entry.nbytes if entry else self.tree.reader(self.relative).size)

    def read_bytes(self) -> bytes:
        """All of a small file.

        Raises:
            RemoteError: it has more than 64 MiB.
        """
        cached = self.tree.local(self.relative)
        if cached is not None:
            return cached.read_bytes()
        reader = self.tree.reader(self.relative)
        if reader.size > _MAX_READ_NBYTES:
            raise RemoteError(
                f"{reader.size} bytes, at most {_MAX_READ_NBYTES} are read whole", path=self
            )
        return reader.read(0, reader.size)

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of a small file, decoded."""
        return self.read_bytes().decode(encoding)

    def open_random(self) -> RandomFile:
        """Open for reading at any offset: in a cache of this machine, else on the server."""
        cached = self.tree.local(self.relative)
        return RemoteFile(self) if cached is None else RandomFile(cached)

    def held(self) -> AbstractContextManager[None]:
        """Keep the tree's connections while the context lasts."""
        return self.tree.held()

    def expect_files(self, names: Iterable[str]) -> None:
        """Announce files in it that will be opened: they are asked for all at once."""
        self.tree.warm((self / name).relative for name in names)

    def open(self, mode: str = "rb", buffering: int = -1) -> io.RawIOBase:
        """Open for reading bytes."""
        if mode != "rb":
            raise CheckpointError("a remote file is only read", path=self)
        return _Stream(self.open_random())


class _Stream(io.RawIOBase):
    """A remote file read from its beginning."""

    def __init__(self, file: RandomFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = self._file.size - self._position
        size = left if size < 0 else min(size, left)
        raw = self._file.read(self._position, size).tobytes()
        self._position += size
        return raw

    def close(self) -> None:
        self._file.close()
        super().close()


def as_path(path: RemotePath) -> Path:
    """A remote path where the readers expect a Path: it has what they use of one."""
    return cast(Path, path)
