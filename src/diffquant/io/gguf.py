"""The GGUF container, versions 2 and 3, little-endian.

::

    "GGUF"  u32 version  u64 tensors  u64 pairs
    pairs:    string key, u32 type, value          string = u64 bytes, UTF-8
              array  = u32 type, u64 count, items
    tensors:  string name, u32 n_dims, u64 dims[n_dims] (innermost first), u32 type, u64 offset
    padding to `general.alignment` (32), then the tensors, each at a multiple of it

Dimensions are reversed here: specs are outermost first, as everywhere else. Counts and lengths are
held against the bytes the file has left before anything is allocated for them. Writing: version 3,
alignment 32, padding of zeros, leading dimensions of size 1 kept (ggml's own writers trim them).

Sources: ggml-org/ggml docs/gguf.md; gguf-py 0.19.0 gguf/gguf_reader.py:120-330; names of at most
127 bytes: city96/ComfyUI-GGUF@795e451:tools/convert.py:12 (MAX_TENSOR_NAME_LENGTH).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.core.dtypes import GGML_IDS, storage, storage_nbytes
from diffquant.core.errors import (
    MalformedFile,
    PlanMismatch,
    TruncatedFile,
    UnsupportedContainer,
    UnsupportedDtype,
    UnsupportedShape,
)
from diffquant.core.tensors import TensorSpec
from diffquant.io.atomic import FlatSink, PartialFile, unique_specs
from diffquant.io.gguf_values import (
    ARRAY_ID,
    CODES,
    TYPE_IDS,
    GgufArray,
    GgufValue,
    encode_string,
    encode_value,
)
from diffquant.io.reading import FlatSource, RandomFile, check_end, checked_shape, open_random

__all__ = [
    "MAX_NAME_NBYTES",
    "RETIRED_IDS",
    "GgufHeader",
    "GgufSource",
    "TensorInfo",
    "create",
    "file_nbytes",
    "open_file",
    "read_header",
    "sniff",
]

MAX_NAME_NBYTES = 127
_MAGIC = b"GGUF"
_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
_MAX_DIMS = 8
_MAX_HEADER_NBYTES = 100_000_000
_FIRST_READ_NBYTES = 1 << 18
_MIN_PAIR_NBYTES = 8 + 4 + 1
_MIN_INFO_NBYTES = 8 + 4 + 4 + 8
_NAMES = {number: name for name, number in TYPE_IDS.items()}
# Ids that ggml gave out and took back: Q4_2, Q4_3, and the repacked Q4_0_N_M and IQ4_NL_N_M.
RETIRED_IDS = {4, 5, 31, 32, 33, 36, 37, 38}


class GgufSource(FlatSource):
    """A GGUF file; `typed_metadata` has each value with its exact type, ready to be written."""

    typed_metadata: Mapping[str, GgufValue]


def sniff(path: Path, head: bytes) -> bool:
    """Tell whether a file that starts with `head` is GGUF."""
    return head.startswith(_MAGIC)


def open_file(path: Path) -> GgufSource:
    """Open a GGUF file; only the header is read, and arrays in it are skipped over.

    Raises:
        TruncatedFile: the file ends before its header or a tensor does.
        MalformedFile: the header breaks a rule of the format.
        UnsupportedContainer: version 1, a version from the future, or big-endian.
        UnsupportedDtype: a tensor type that ggml has retired.
    """
    file = open_random(path)
    try:
        header = read_header(file)
        typed = header.pairs
        specs: dict[str, TensorSpec] = {}
        offsets: dict[str, int] = {}
        for info in header.tensors:
            spec = _checked_spec(info, path)
            if spec.key in specs:
                raise MalformedFile(f"tensor {spec.key!r} appears twice", path=path)
            specs[spec.key], offsets[spec.key] = spec, info.offset
        alignment = _checked_alignment(typed, path)
        start = -(-header.nbytes // alignment) * alignment
        offsets = {key: start + offset for key, offset in offsets.items()}
        _check_extents(specs, offsets, alignment, file)
    except BaseException:
        file.close()
        raise
    source = GgufSource(
        file,
        "gguf",
        specs=specs,
        offsets=offsets,
        metadata={key: item.value for key, item in typed.items()},
    )
    source.typed_metadata = typed
    return source


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
    """Read a header without judging its tensors: `open_file` refuses, an audit reports.

    Raises:
        TruncatedFile, MalformedFile, UnsupportedContainer: it cannot be read to its end.
    """
    cursor = _Cursor(file)
    if cursor.take(4, "magic") != _MAGIC:
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
    if n_dims > _MAX_DIMS:
        raise cursor.fail(f"tensor {key!r} has {n_dims} dimensions, at most {_MAX_DIMS} expected")
    dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, f"dimensions of {key!r}"))
    type_id = cursor.u32(f"type of {key!r}")
    return TensorInfo(key, dims, type_id, cursor.u64(f"offset of {key!r}"))


def _checked_spec(info: TensorInfo, path: Path) -> TensorSpec:
    key, row = info.key, GGML_IDS.get(info.type_id)
    if row is None:
        if info.type_id in RETIRED_IDS:
            raise UnsupportedDtype(
                f"{path}: {key!r} has ggml type id {info.type_id}, which ggml has retired"
            )
        raise MalformedFile(
            f"{key!r} has unknown ggml type id {info.type_id}: damaged, or newer than this program",
            path=path,
        )
    shape = checked_shape(info.dims[::-1], key, path)
    try:
        storage_nbytes(row.name, shape)
    except UnsupportedShape as error:
        raise MalformedFile(f"tensor {key!r}: {error}", path=path) from None
    return TensorSpec(key, row.name, shape)


def _checked_alignment(typed: Mapping[str, GgufValue], path: Path) -> int:
    item = typed.get(_ALIGNMENT_KEY)
    if item is None:
        return _ALIGNMENT
    value = item.value
    if item.type != "u32" or not isinstance(value, int) or value < 1 or value & (value - 1):
        raise MalformedFile(f"{_ALIGNMENT_KEY} is {value!r}, a power of two expected", path=path)
    return value


def _check_extents(
    specs: Mapping[str, TensorSpec], offsets: Mapping[str, int], alignment: int, file: RandomFile
) -> None:
    """Check that tensors are aligned, apart from each other, and inside the file."""
    end = 0
    for key in sorted(specs, key=lambda name: (offsets[name], specs[name].nbytes)):
        begin, nbytes = offsets[key], specs[key].nbytes
        if begin % alignment:
            raise MalformedFile(
                f"{key!r} starts at byte {begin}, no multiple of {alignment}", path=file.path
            )
        if begin < end:
            raise MalformedFile(
                f"{key!r} starts at byte {begin}, inside the tensor that ends at {end}",
                path=file.path,
            )
        end = begin + nbytes
    check_end(specs, offsets, file)


def create(
    path: Path,
    specs: Iterable[TensorSpec],
    metadata: Mapping[str, Any],
    *,
    force: bool = False,
    file: Callable[[Path, int], PartialFile] = PartialFile,
) -> FlatSink:
    """Open a GGUF file for writing; the header is written at once.

    Args:
        path: the target, renamed into place by `commit`.
        specs: tensors in file order, shapes outermost first.
        metadata: pairs in file order; values as `gguf_values` lists them.
        force: whether an existing target may be replaced.
        file: opens the temporary file; see FlatSink.

    Raises:
        UnsupportedDtype: a spec's dtype has no GGML type.
        UnsupportedShape: a shape of more than 8 dimensions, or rows that are not whole blocks.
        PlanMismatch: a name over 127 bytes, or a metadata value that no GGUF type holds.
        UsageError, ResourceError: the target exists, or the disk is too small.
    """
    planned = unique_specs(specs)
    for spec in planned:
        if storage(spec.dtype).ggml_id is None:
            raise UnsupportedDtype(f"{spec.key}: GGUF has no type {spec.dtype}")
        if len(spec.shape) > _MAX_DIMS:
            raise UnsupportedShape(f"{spec.key}: {len(spec.shape)} dimensions, GGUF has 8")
        nbytes = len(spec.key.encode())
        if nbytes > MAX_NAME_NBYTES:
            raise PlanMismatch(
                f"{spec.key}: name of {nbytes} bytes, ComfyUI-GGUF and ggml stop at "
                f"{MAX_NAME_NBYTES}"
            )
    if _ALIGNMENT_KEY in metadata:
        raise PlanMismatch(f"{path}: {_ALIGNMENT_KEY} is always {_ALIGNMENT} here: leave it out")
    begins, total = _lay_out(planned)

    def render(metadata: Mapping[str, Any]) -> bytes:
        return _render(planned, begins, metadata)

    start = len(render(metadata))
    extents = {spec.key: (start + begins[spec.key], spec.nbytes) for spec in planned}
    return FlatSink(
        path,
        extents=extents,
        nbytes=start + total,
        metadata=metadata,
        render=render,
        force=force,
        file=file,
    )


def file_nbytes(specs: Sequence[TensorSpec], metadata: Mapping[str, Any]) -> int:
    """Bytes of the file that `create` makes of them."""
    begins, total = _lay_out(specs)
    return len(_render(tuple(specs), begins, metadata)) + total


def _lay_out(specs: Sequence[TensorSpec]) -> tuple[dict[str, int], int]:
    """Where each tensor begins behind the header, and where the last one ends."""
    begins: dict[str, int] = {}
    total = 0
    for spec in specs:
        begins[spec.key] = total
        total += _padded(spec.nbytes)
    return begins, total


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _render(
    specs: tuple[TensorSpec, ...], begins: Mapping[str, int], metadata: Mapping[str, Any]
) -> bytes:
    parts = [_MAGIC, struct.pack("<IQQ", 3, len(specs), len(metadata))]
    for key, value in metadata.items():
        parts += (encode_string(key), encode_value(key, value))
    for spec in specs:
        dims = spec.shape[::-1]
        parts += (
            encode_string(spec.key),
            struct.pack(f"<I{len(dims)}Q", len(dims), *dims),
            struct.pack("<IQ", storage(spec.dtype).ggml_id, begins[spec.key]),
        )
    raw = b"".join(parts)
    return raw + bytes(_padded(len(raw)) - len(raw))
