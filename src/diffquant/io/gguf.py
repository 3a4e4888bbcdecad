"""The GGUF container, versions 2 and 3, little-endian.

::

    "GGUF"  u32 version  u64 tensors  u64 pairs
    pairs:    string key, u32 type, value          string = u64 bytes, UTF-8
              array  = u32 type, u64 count, items
    tensors:  string name, u32 n_dims, u64 dims[n_dims] (innermost first), u32 type, u64 offset
    padding to `general.alignment` (32), then the tensors, each at a multiple of it

Dimensions are reversed here: specs are outermost first, as everywhere else. `gguf_header` reads,
this file checks and writes: version 3, alignment 32, padding of zeros, leading dimensions of size 1
kept (ggml's own writers trim them).

Sources: ggml-org/ggml docs/gguf.md; gguf-py 0.19.0 gguf/gguf_reader.py:120-330; names of at most
127 bytes: city96/ComfyUI-GGUF@795e451:tools/convert.py:12 (MAX_TENSOR_NAME_LENGTH).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffquant.core.dtypes import GGML_IDS, storage, storage_nbytes
from diffquant.core.errors import (
    MalformedFile,
    PlanMismatch,
    UnsupportedDtype,
    UnsupportedShape,
)
from diffquant.core.tensors import TensorSpec
from diffquant.io.atomic import FlatSink, PartialFile, unique_specs
from diffquant.io.gguf_header import MAGIC, MAX_DIMS, TensorInfo, read_header
from diffquant.io.gguf_values import (
    GgufValue,
    encode_string,
    encode_value,
)
from diffquant.io.reading import FlatSource, RandomFile, check_end, checked_shape, open_random

__all__ = [
    "MAX_NAME_NBYTES",
    "RETIRED_IDS",
    "GgufSource",
    "create",
    "file_nbytes",
    "open_file",
    "sniff",
]

MAX_NAME_NBYTES = 127
_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
# Ids that ggml gave out and took back: Q4_2, Q4_3, and the repacked Q4_0_N_M and IQ4_NL_N_M.
RETIRED_IDS = {4, 5, 31, 32, 33, 36, 37, 38}


class GgufSource(FlatSource):
    """A GGUF file; `typed_metadata` has each value with its exact type, ready to be written."""

    typed_metadata: Mapping[str, GgufValue]


def sniff(path: Path, head: bytes) -> bool:
    """Tell whether a file that starts with `head` is GGUF."""
    return head.startswith(MAGIC)


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
        if len(spec.shape) > MAX_DIMS:
            raise UnsupportedShape(f"{spec.key}: {len(spec.shape)} dimensions, GGUF has {MAX_DIMS}")
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
    parts = [MAGIC, struct.pack("<IQQ", 3, len(specs), len(metadata))]
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
