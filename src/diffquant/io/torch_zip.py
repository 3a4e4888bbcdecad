"""The zip archive that torch.save writes since 1.6: its objects, and where its storages lie.

Drawn in `torch_pickle`. Entries are stored, not compressed, so that a storage is read where it
lies; only the directory and the pickle are read whole, each up to a cap.

Sources: pytorch/pytorch torch/serialization.py (`_save`).
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from diffquant.core.errors import MalformedFile, TruncatedFile, UnsupportedContainer
from diffquant.io.reading import RandomFile
from diffquant.io.torch_unpickle import MAX_PICKLE_NBYTES, load

__all__ = ["ZIP_MAGIC", "open_zip"]

ZIP_MAGIC = b"PK\x03\x04"
_MAX_DIRECTORY_NBYTES = 64 << 20


def open_zip(file: RandomFile) -> tuple[Any, Mapping[str, int]]:
    """Return the unpickled objects and where each storage's bytes lie.

    Raises:
        MalformedFile, TruncatedFile: no archive that torch.save writes, or one cut short.
        UnsupportedContainer: TorchScript, or big-endian.
        UnsafePickle: the pickle names something outside the allow-list.
    """
    entries = _zip_entries(file)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise MalformedFile(
            "a zip archive without one <name>/data.pkl: not a torch.save file", path=file.path
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "constants.pkl" in entries:
        raise UnsupportedContainer(
            "a TorchScript archive holds code, not only weights", path=file.path
        )
    order = entries.get(prefix + "byteorder")
    if order is not None and _zip_bytes(file, order, 16) != b"little":
        raise UnsupportedContainer("big-endian torch.save file", path=file.path)
    tree, refs = load(_zip_bytes(file, entries[pickles[0]], MAX_PICKLE_NBYTES), file.path)
    stored: dict[str, zipfile.ZipInfo] = {}
    for ref in refs.values():
        entry = entries.get(f"{prefix}data/{ref.key}")
        if entry is None:
            raise MalformedFile(f"storage {ref.key!r} is missing", path=file.path)
        if entry.file_size < ref.nbytes:
            raise TruncatedFile(
                f"storage {ref.key!r} has {entry.file_size} bytes, {ref.nbytes} expected",
                path=file.path,
            )
        stored[ref.key] = entry
    places = _ZipPlaces(file, stored)
    if not file.remote:
        for name in stored:
            _ = places[name]  # checks it
    return tree, places


class _ZipPlaces(Mapping[str, int]):
    """Where the storages of an archive begin: behind headers of their own, read when asked for.

    A header is 30 bytes at the head of each storage: at once on a disk, a request each on a server.
    """

    def __init__(self, file: RandomFile, entries: Mapping[str, zipfile.ZipInfo]) -> None:
        self._file = file
        self._entries = entries
        self._known: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        if name not in self._known:
            self._known[name] = _zip_place(self._file, self._entries[name])
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # without reading the header

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _BoundedFile(io.RawIOBase):
    """What zipfile reads through: no single read over the cap, whatever the directory claims."""

    def __init__(self, file: RandomFile) -> None:
        self._file = file
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._file.size)[whence]
        if base + offset < 0:
            raise ValueError("seek before the file's start")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._file.size - self._position)
        size = left if size is None or size < 0 else min(size, left)
        if size > _MAX_DIRECTORY_NBYTES:
            raise MalformedFile(f"zip directory of {size} bytes", path=self._file.path)
        raw = self._file.read(self._position, size).tobytes()
        self._position += size
        return raw


def _zip_entries(file: RandomFile) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(_BoundedFile(file)) as archive:
            infos = archive.infolist()
    except (
        zipfile.BadZipFile, EOFError, LookupError, NotImplementedError, OverflowError, ValueError,
        struct.error,
    ) as error:  # fmt: skip
        raise TruncatedFile(
            f"zip directory cannot be read ({error}): download it again", path=file.path
        ) from None
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise MalformedFile("zip archive names an entry twice", path=file.path)
    return entries


def _zip_place(file: RandomFile, entry: zipfile.ZipInfo) -> int:
    """Return where a stored entry's bytes begin.

    Raises:
        MalformedFile: it is compressed or encrypted, which torch never does.
        TruncatedFile: it ends beyond the file.
    """
    name = entry.filename
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise MalformedFile(f"zip entry {name!r} is compressed or encrypted", path=file.path)
    head = file.read(entry.header_offset, 30).tobytes()
    if not head.startswith(ZIP_MAGIC):
        raise MalformedFile(f"zip entry {name!r} does not start with a header", path=file.path)
    name_nbytes, extra_nbytes = struct.unpack_from("<HH", head, 26)
    place = entry.header_offset + 30 + int(name_nbytes) + int(extra_nbytes)
    if place + entry.file_size > file.size:
        raise TruncatedFile(f"zip entry {name!r} ends beyond the file", path=file.path)
    return place


def _zip_bytes(file: RandomFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    place = _zip_place(file, entry)
    if entry.file_size > limit:
        raise MalformedFile(
            f"{entry.filename!r} has {entry.file_size} bytes, at most {limit} expected",
            path=file.path,
        )
    return file.read(place, entry.file_size).tobytes()
