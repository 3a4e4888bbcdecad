"""Importance matrices as GGUF files.

`general.type` = "imatrix", `imatrix.datasets` (strings), `imatrix.chunk_count` and
`imatrix.chunk_size` (u32), and for every weight two F32 tensors::

    <name>.in_sum2   (K,), or (matrices, K) for stacked experts: sums of squares
    <name>.counts    (1,), or (matrices, 1): rows that were summed

Other tensors (`<name>.in_sum` of newer collectors) are skipped.

Sources: ggml-org/llama.cpp@006e7ef:tools/imatrix/imatrix.cpp, save_imatrix;
ggml-org/llama.cpp@42ea59b:tools/quantize/quantize.cpp, load_imatrix;
gguf-py 0.19.0 gguf/constants.py `Keys.IMatrix`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.core.errors import MalformedFile, UnsupportedContainer, shorten
from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.io import gguf
from diffquant.io.gguf_values import GgufArray, GgufValue
from diffquant.io.importance import Entry, ImportanceMatrix, checked_values

__all__ = ["is_gguf_imatrix", "read_gguf", "write_gguf"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS = "imatrix.datasets", "imatrix.chunk_count"
_CHUNK_SIZE = "imatrix.chunk_size"


def is_gguf_imatrix(source: TensorSource) -> bool:
    """Whether an open GGUF file is an importance matrix."""
    named = source.metadata.get("general.type")
    if isinstance(named, str):
        return named == "imatrix"
    return any(key.endswith(_SUMS) for key in source.specs)


def read_gguf(source: TensorSource) -> ImportanceMatrix:
    """Read an importance matrix from an open GGUF file.

    Raises:
        UnsupportedContainer: the file is something else.
        MalformedFile: sums and counts do not fit, or hold what cannot have been measured.
    """
    path = source.path
    if not is_gguf_imatrix(source):
        raise UnsupportedContainer("a GGUF file, but no importance matrix", path=path)
    names = sorted(key.removesuffix(_SUMS) for key in source.specs if key.endswith(_SUMS))
    counted = {key.removesuffix(_COUNTS) for key in source.specs if key.endswith(_COUNTS)}
    if odd := sorted(counted.symmetric_difference(names)):
        raise MalformedFile(
            f"sums without counts, or counts without sums: {shorten(odd)}", path=path
        )
    if not names:
        raise MalformedFile("an importance matrix without entries", path=path)
    return ImportanceMatrix(
        entries={name: _gguf_entry(source, name) for name in names},
        datasets=_datasets(source),
        chunk_count=_number(source, _CHUNKS, 0),
        chunk_size=max(_number(source, _CHUNK_SIZE, 1), 1),
        files=(path.name,),
    )


def _gguf_entry(source: TensorSource, name: str) -> Entry:
    sums_spec, counts_spec = source.specs[name + _SUMS], source.specs[name + _COUNTS]
    for spec in (sums_spec, counts_spec):
        if spec.dtype != "F32" or not spec.size:
            raise MalformedFile(
                f"{spec.key!r} is {spec.dtype} of shape {spec.shape}, expected F32 values",
                path=source.path,
            )
    if sums_spec.size % counts_spec.size:
        raise MalformedFile(
            f"{name!r} has {sums_spec.size} sums for {counts_spec.size} counts: not a whole number "
            "of columns each",
            path=source.path,
        )
    sums = source.read(sums_spec.key).view("<f4")
    counts = source.read(counts_spec.key).view("<f4")
    checked_values(sums, name, "sums", source.path)
    checked_values(counts, name, "counts", source.path)
    return Entry(sums.astype(np.float64).reshape(counts.size, -1), np.rint(counts).astype(np.int64))


def _number(source: TensorSource, key: str, default: int) -> int:
    value = source.metadata.get(key, default)
    if type(value) is not int or not 0 <= value < 2**31:
        raise MalformedFile(f"{key} is {value!r:.40}, expected a count", path=source.path)
    return value


def _datasets(source: TensorSource) -> tuple[str, ...]:
    value = source.metadata.get(_DATASETS, ())
    if isinstance(value, GgufArray) and (value.type == "str" or not len(value)):
        return tuple(value)
    if value == ():
        return ()
    raise MalformedFile(f"{_DATASETS} is no array of strings", path=source.path)


def write_gguf(path: Path, matrix: ImportanceMatrix, *, force: bool) -> None:
    """Write a GGUF file, tensors sorted by weight name."""
    tensors: dict[str, NDArray[np.float32]] = {}
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        sums, counts = entry.sums.astype("<f4"), entry.counts.astype("<f4")
        single = counts.size == 1  # ggml writes no trailing dimension of one
        tensors[name + _SUMS] = sums.reshape(-1) if single else sums
        tensors[name + _COUNTS] = counts if single else counts[:, None]
    metadata: dict[str, Any] = {
        "general.type": "imatrix",
        _DATASETS: GgufValue("str", matrix.datasets),
        _CHUNKS: GgufValue("u32", matrix.chunk_count),
        _CHUNK_SIZE: GgufValue("u32", matrix.chunk_size),
    }
    specs = [TensorSpec(key, "F32", array.shape) for key, array in tensors.items()]
    with gguf.create(path, specs, metadata, force=force) as sink:
        for key, array in tensors.items():
            sink.write(key, 0, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        sink.commit()
