"""Read a GGUF header: pairs and tensors as they stand, unjudged.

`gguf.open_file` refuses what breaks a rule, an audit reports it: both read through `read_header`.
Counts and lengths are held against the bytes the file has left before anything is allocated.

Sources: those of `gguf`, where the layout is drawn.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffquant.core.errors import MalformedFile, TruncatedFile, UnsupportedContainer
from diffquant.io.gguf_values import ARRAY_ID, CODES, TYPE_IDS, GgufArray, GgufValue
from diffquant.io.reading import RandomFile

__all__ = ["MAGIC", "MAX_DIMS", "GgufHeader", "TensorInfo", "read_header"]

MAGIC = b"GGUF"
MAX_DIMS = 8
_MAX_HEADER_NBYTES = 100_000_000
_FIRST_READ_NBYTES = 1 << 18
_MIN_PAIR_NBYTES = 8 + 4 + 1
_MIN_INFO_NBYTES = 8 + 4 + 4 + 8
_NAMES = {number: name for name, number in TYPE_IDS.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as the header has it, unchecked; dimensions innermost first."""

    key: str
    dims: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """A header as it stands; what its tensors say is not checked yet. `nbytes` has no padding."""

    version: int
    pairs: Mapping[str, GgufValue]
    tensors: tuple[TensorInfo, ...]
    nbytes: int


def read_header(file: RandomFile) -> GgufHeader:
    """Read a header without judging its tensors: `gguf.open_file` refuses, an audit reports.

    Raises:
        TruncatedFile, MalformedFile, UnsupportedContainer: it cannot be read to its end.
    """
    cursor = _Cursor(file)
    if cursor.take(4, "magic") != MAGIC:
        raise MalformedFile("does not start with 'GGUF'", path=file.path)
    version = cursor.u32("version")
    _check_version(version, file.path)
    tensor_count, pair_count = cursor.u64("tensor count"), cursor.u64("pair count")
    cursor.check_room(pair_count, _MIN_PAIR_NBYTES, "metadata pairs")
    pairs = _read_pairs(cursor, pair_count)
    cursor.check_room(tensor_count, _MIN_INFO_NBYTES, "tensors")
    tensors = tuple(_read_info(cursor) for _ in range(tensor_count))
    return GgufHeader(version, pairs, tensors, cursor.position)


def _check_version(version: int, path: Path) -> None:
    if version in (2, 3):
        return
    if version and version & 0xFFFF == 0:
        raise UnsupportedContainer("big-endian GGUF, only little-endian is read", path=path)
    raise UnsupportedContainer(f"GGUF version {version}, only 2 and 3 are read", path=path)


class _Cursor:
    """Walks the header; reads more of the file when needed, never past its end."""

    def __init__(self, file: RandomFile) -> None:
        self._file = file
        self._buffer = bytearray(file.read(0, min(file.size, _FIRST_READ_NBYTES)).tobytes())
        self.path = file.path
        self.position = 0

    def fail(self, message: str) -> MalformedFile:
        """Build an error that names the file."""
        return MalformedFile(message, path=self.path)

    def check_room(self, count: int, nbytes_each: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold."""
        if count * nbytes_each > self._file.size - self.position:
            raise self.fail(
                f"{count} {what} need at least {count * nbytes_each} bytes, "
                f"the file has {self._file.size - self.position} left"
            )

    def take(self, nbytes: int, what: str) -> bytes:
        """Return the next bytes."""
        end = self.position + nbytes
        if end > len(self._buffer):
            self._grow(end, what)
        raw = bytes(self._buffer[self.position : end])
        self.position = end
        return raw

    def u32(self, what: str) -> int:
        """Return the next unsigned 32-bit number."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """Return the next unsigned 64-bit number."""
        return int.from_bytes(self.take(8, what), "little")

    def text(self, what: str) -> str:
        """Return the next string."""
        raw = self.take(self.u64(f"length of {what}"), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error}") from None

    def take_strings(self, count: int, what: str) -> bytes:
        """Return `count` strings undecoded."""
        begin = position = self.position
        end = len(self._buffer)
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position + 8 > end:
                end = self._grow(position + 8, what)
            position += 8 + unpack(self._buffer, position)[0]
        if position > end:
            self._grow(position, what)
        self.position = position
        return bytes(self._buffer[begin:position])

    def _grow(self, end: int, what: str) -> int:
        """Read on until the buffer reaches `end`; return the new length."""
        if end > self._file.size:
            raise TruncatedFile(
                f"{what} ends at byte {end}, the file has {self._file.size}", path=self.path
            )
        if end > _MAX_HEADER_NBYTES:
            raise self.fail(f"{what} ends at byte {end}: header over {_MAX_HEADER_NBYTES} bytes")
        have = len(self._buffer)
        wanted = min(max(end, 4 * have), self._file.size, _MAX_HEADER_NBYTES)
        self._buffer += self._file.read(have, wanted - have).tobytes()
        return wanted


def _read_pairs(cursor: _Cursor, count: int) -> dict[str, GgufValue]:
    typed: dict[str, GgufValue] = {}
    for index in range(count):
        key = cursor.text(f"key {index}")
        if key in typed:
            raise cursor.fail(f"metadata key {key!r} appears twice")
        type_id = cursor.u32(f"type of {key!r}")
        if type_id == ARRAY_ID:
            typed[key] = _read_array(cursor, key)
            continue
        name = _checked_type(cursor, type_id, key)
        if name == "str":
            typed[key] = GgufValue(name, cursor.text(f"value of {key!r}"))
        else:
            code = "<" + CODES[name]
            raw = cursor.take(struct.calcsize(code), f"value of {key!r}")
            typed[key] = GgufValue(name, struct.unpack(code, raw)[0])
    return typed


def _read_array(cursor: _Cursor, key: str) -> GgufValue:
    what = f"array {key!r}"
    type_id, count = cursor.u32(what), cursor.u64(what)
    if type_id == ARRAY_ID:
        raise cursor.fail(f"{what} holds arrays, which no tool writes")
    name = _checked_type(cursor, type_id, key)
    nbytes = 8 if name == "str" else struct.calcsize("<" + CODES[name])
    cursor.check_room(count, nbytes, f"items of {what}")
    raw = cursor.take_strings(count, what) if name == "str" else cursor.take(count * nbytes, what)
    return GgufValue(name, GgufArray(name, count, raw))


def _checked_type(cursor: _Cursor, type_id: int, key: str) -> str:
    name = _NAMES.get(type_id)
    if name is None:
        raise cursor.fail(f"metadata {key!r} has unknown type id {type_id}")
    return name


def _read_info(cursor: _Cursor) -> TensorInfo:
    key = cursor.text("a tensor name")
    n_dims = cursor.u32(f"dimensions of {key!r}")
    if n_dims > MAX_DIMS:
        raise cursor.fail(f"tensor {key!r} has {n_dims} dimensions, at most {MAX_DIMS} expected")
    dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, f"dimensions of {key!r}"))
    type_id = cursor.u32(f"type of {key!r}")
    return TensorInfo(key, dims, type_id, cursor.u64(f"offset of {key!r}"))
