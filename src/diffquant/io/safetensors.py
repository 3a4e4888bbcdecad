"""The safetensors container: one JSON header, then tensors that tile the rest of the file.

::

    u64 little-endian   n, bytes of header (at most 100 MB)
    n bytes             JSON {"key": {"dtype", "shape", "data_offsets": [begin, end]}, ...}
                        padded with spaces to a multiple of 8; "__metadata__" maps text to text
    rest                the tensors, begin and end counted from here, no gap and no overlap

A header is hostile input: every number in it is checked before anything is allocated. The header
keeps the order it was given. So does the data where every tensor then starts at a multiple of its
element size; otherwise wide elements go first, since torch cannot view a misaligned slice.

Sources: huggingface/safetensors@24b0b28:safetensors/src/tensor.rs (rules, `MAX_HEADER_SIZE`), and
README.md, section Format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffquant.core.dtypes import STORAGE, storage
from diffquant.core.errors import (
    MalformedFile,
    PlanMismatch,
    TruncatedFile,
    UnsupportedDtype,
)
from diffquant.core.tensors import TensorSpec
from diffquant.io.atomic import FlatSink, PartialFile, unique_specs
from diffquant.io.reading import FlatSource, RandomFile, check_end, checked_shape, open_random

__all__ = [
    "MAX_HEADER_NBYTES",
    "checked_entry",
    "create",
    "file_nbytes",
    "open_file",
    "parse_json",
    "read_header",
    "sniff",
]

MAX_HEADER_NBYTES = 100_000_000
_METADATA = "__metadata__"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_FIELDS = {"dtype", "shape", "data_offsets"}
# Dtypes that the format has and STORAGE lacks: half bytes, complex numbers, AMD's fp8.
_UNSUPPORTED = {"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}


def sniff(path: Path, head: bytes) -> bool:
    """Tell whether a file that starts with `head` looks like safetensors."""
    return (
        len(head) > 8
        and head[8:9] == b"{"
        and int.from_bytes(head[:8], "little") <= MAX_HEADER_NBYTES
    )


def open_file(path: Path) -> FlatSource:
    """Open a safetensors file; only the header is read.

    Raises:
        TruncatedFile: the file ends before its header or its data.
        MalformedFile: the header breaks a rule of the format.
        UnsupportedDtype: a tensor has a dtype that STORAGE lacks.
    """
    file = open_random(path)
    try:
        start, header = read_header(file)
        metadata = _checked_metadata(header.pop(_METADATA, {}), path)
        specs: dict[str, TensorSpec] = {}
        offsets: dict[str, int] = {}
        extents: list[tuple[int, int, str]] = []
        for key, entry in header.items():
            spec, begin, end = checked_entry(key, entry, path)
            specs[key], offsets[key] = spec, start + begin
            extents.append((begin, end, key))
        _check_tiles(extents, start, file, specs=specs, offsets=offsets)
    except BaseException:
        file.close()
        raise
    return FlatSource(file, "safetensors", specs=specs, offsets=offsets, metadata=metadata)


def read_header(file: RandomFile) -> tuple[int, dict[str, Any]]:
    """Return where the data starts and the parsed header, its entries unchecked.

    Raises:
        TruncatedFile, MalformedFile: there is no header, or it is not one JSON object.
    """
    if file.size < 8:
        raise TruncatedFile(
            f"{file.size} bytes, a safetensors file has at least 10", path=file.path
        )
    nbytes = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if nbytes > MAX_HEADER_NBYTES:
        raise MalformedFile(
            f"not a safetensors file, or damaged: header length {nbytes}, "
            f"at most {MAX_HEADER_NBYTES} expected",
            path=file.path,
        )
    if 8 + nbytes > file.size:
        raise TruncatedFile(
            f"header of {nbytes} bytes expected, the file has {file.size - 8} after its length: "
            "download it again",
            path=file.path,
        )
    raw = file.read(8, nbytes).tobytes()
    if not raw.startswith(b"{"):
        raise MalformedFile(
            f"header starts with {raw[:1]!r}, '{{' expected: not a safetensors file",
            path=file.path,
        )
    return 8 + nbytes, parse_json(raw, file.path, "header")


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object, refusing repeated keys and text that is not Unicode.

    Raises:
        MalformedFile: it is not one JSON object in UTF-8.
    """
    try:
        text = raw.decode("utf-8")
        parsed = json.loads(text, object_pairs_hook=_unique_pairs)
        if _SURROGATE.search(text):
            json.dumps(parsed, ensure_ascii=False).encode()  # of half a pair: UnicodeEncodeError
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError too
        raise MalformedFile(f"{what} is not valid JSON: {error}", path=path) from None
    if not isinstance(parsed, dict):
        raise MalformedFile(f"{what} is not a JSON object", path=path)
    return parsed


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} appears twice")
            seen.add(key)
    return found


def _checked_metadata(metadata: object, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise MalformedFile(f"{_METADATA} is not an object", path=path)
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise MalformedFile(f"{_METADATA} {key!r} is not text", path=path)
    return metadata


def checked_entry(key: str, entry: object, path: Path) -> tuple[TensorSpec, int, int]:
    """Return the spec and where its data begins and ends, counted from the start of the data.

    Raises:
        MalformedFile: the entry breaks a rule.
        UnsupportedDtype: a dtype that the format has and STORAGE lacks.
    """
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise MalformedFile(f"entry {key!r} must have exactly {sorted(_FIELDS)}", path=path)
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        raise MalformedFile(f"dtype of {key!r} is not text", path=path)
    row = STORAGE.get(dtype)
    if row is None or not row.safetensors:
        if dtype in _UNSUPPORTED:
            raise UnsupportedDtype(f"{path}: {key!r} has dtype {dtype}, which is not supported")
        raise MalformedFile(f"{key!r} has unknown dtype {dtype!r:.40}", path=path)
    shape = checked_shape(entry["shape"], key, path)
    nbytes = math.prod(shape) * row.block_nbytes  # no dtype of safetensors has blocks
    offsets = entry["data_offsets"]
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not (type(offsets[0]) is type(offsets[1]) is int)
        or min(offsets) < 0
    ):
        raise MalformedFile(f"data_offsets of {key!r} must be two integers >= 0", path=path)
    begin, end = offsets
    if end - begin != nbytes:
        raise MalformedFile(
            f"{key!r} is {dtype} {list(shape)}, {nbytes} bytes, "
            f"but its data_offsets span {end - begin}",
            path=path,
        )
    return TensorSpec(key, dtype, shape), begin, end


def _check_tiles(
    extents: list[tuple[int, int, str]],
    start: int,
    file: RandomFile,
    *,
    specs: Mapping[str, TensorSpec],
    offsets: Mapping[str, int],
) -> None:
    """Check that (begin, end, key) tile the bytes behind `start` without gap or overlap."""
    position = 0
    for begin, end, key in sorted(extents):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap"
            raise MalformedFile(
                f"{key!r} {kind}: starts at {begin}, {position} expected", path=file.path
            )
        position = end
    position += start
    if position > file.size:
        check_end(specs, offsets, file)
    if position < file.size:
        raise MalformedFile(f"{file.size - position} bytes after the last tensor", path=file.path)


def create(
    path: Path,
    specs: Iterable[TensorSpec],
    metadata: Mapping[str, Any],
    *,
    force: bool = False,
    file: Callable[[Path, int], PartialFile] = PartialFile,
) -> FlatSink:
    """Open a safetensors file for writing; the header is written at once.

    Args:
        path: the target, renamed into place by `commit`.
        specs: tensors in the order the header shall list them.
        metadata: text to text.
        force: whether an existing target may be replaced.
        file: opens the temporary file; see FlatSink.

    Raises:
        UnsupportedDtype: a spec's dtype has no safetensors name.
        PlanMismatch: metadata that is not text, or a tensor named "__metadata__".
        UsageError, ResourceError: the target exists, or the disk is too small.
    """
    planned = unique_specs(specs)
    for spec in planned:
        if not storage(spec.dtype).safetensors:
            raise UnsupportedDtype(f"{spec.key}: safetensors has no dtype {spec.dtype}")
        if spec.key == _METADATA:
            raise PlanMismatch(f"{path}: a tensor cannot be called {_METADATA}")
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
    planned = tuple(specs)
    begins, total = _lay_out(planned)
    return len(_render(planned, begins, metadata)) + total


def _lay_out(specs: tuple[TensorSpec, ...]) -> tuple[dict[str, int], int]:
    """Place the data: in the given order if that is aligned, else wide elements first."""
    for order in (specs, sorted(specs, key=lambda spec: -storage(spec.dtype).block_nbytes)):
        begins: dict[str, int] = {}
        position = 0
        for spec in order:
            begins[spec.key] = position
            position += spec.nbytes
        if all(begins[spec.key] % storage(spec.dtype).block_nbytes == 0 for spec in specs):
            break
    return begins, position


def _render(
    specs: tuple[TensorSpec, ...], begins: Mapping[str, int], metadata: Mapping[str, Any]
) -> bytes:
    header: dict[str, Any] = {}
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise PlanMismatch(f"metadata {key!r} is {type(value).__name__}, safetensors has text")
    if metadata:
        header[_METADATA] = dict(metadata)
    for spec in specs:
        begin = begins[spec.key]
        header[spec.key] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_NBYTES:
        raise PlanMismatch(f"header of {len(raw)} bytes, at most {MAX_HEADER_NBYTES} are read back")
    return len(raw).to_bytes(8, "little") + raw
