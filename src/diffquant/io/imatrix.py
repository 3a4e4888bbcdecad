"""Importance matrix files: recognise, read and write both of llama.cpp's kinds.

What they hold is importance.py's; the bytes are imatrix_gguf.py's and imatrix_legacy.py's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffquant.core.errors import CheckpointError, MalformedFile, UsageError
from diffquant.io import gguf
from diffquant.io.atomic import check_parent
from diffquant.io.imatrix_gguf import is_gguf_imatrix, read_gguf, write_gguf
from diffquant.io.imatrix_legacy import check_legacy, read_legacy, write_legacy
from diffquant.io.importance import Entry, ImportanceMatrix, merge_imatrices, with_prefix
from diffquant.io.reading import RandomFile

__all__ = [
    "Entry",
    "ImportanceMatrix",
    "check_target",
    "is_gguf_imatrix",
    "is_legacy_imatrix",
    "merge_imatrices",
    "read_gguf",
    "read_imatrix",
    "with_prefix",
    "write_imatrix",
]


_WRITERS = {".gguf": write_gguf, ".dat": write_legacy}


def is_legacy_imatrix(path: Path) -> bool:
    """Whether a file is a legacy importance matrix: it has no magic number, its fields tile it."""
    try:
        file = RandomFile(path)
    except CheckpointError:
        return False
    try:
        check_legacy(file)
    except CheckpointError:
        return False
    finally:
        file.close()
    return True


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix of either kind, told apart by content.

    Raises:
        TruncatedFile, MalformedFile: the file breaks a rule of its kind.
        UnsupportedContainer: a GGUF file that is something else, or no importance matrix at all.
    """
    file = RandomFile(path)
    try:
        if file.size >= 4 and file.read(0, 4).tobytes() == b"GGUF":
            with gguf.open_file(path) as source:
                return read_gguf(source)
        return read_legacy(file)
    finally:
        file.close()


def check_target(path: Path, *, force: bool = False) -> None:
    """Check that a matrix can be written to `path`, before the work of making one.

    Raises:
        UsageError: an extension of neither kind, no such folder, or the file exists and `force` is
            not given.
    """
    if path.suffix.lower() not in _WRITERS:
        raise UsageError(
            f"{path}: importance matrices are written as .gguf, or as .dat for older programs"
        )
    check_parent(path)
    if path.exists() and not force:
        raise UsageError(f"{path} exists; use --force to replace it")


def write_imatrix(path: Path, matrix: ImportanceMatrix, *, force: bool = False) -> None:
    """Write a file of the kind its extension names, .gguf or .dat; weights sorted by name.

    Legacy files keep one count per weight: the calls, which are chunks rounded up, as
    llama-imatrix writes them; of several datasets they keep the last.

    Raises:
        UsageError: see `check_target`.
        MalformedFile: sums beyond float32's range.
        ResourceError: not enough disk.
    """
    check_target(path, force=force)
    for name, entry in matrix.entries.items():
        if not (entry.sums <= np.finfo(np.float32).max).all():
            raise MalformedFile(f"{name}: sums beyond the range of float32", path=path)
    _WRITERS[path.suffix.lower()](path, matrix, force=force)
