"""Small checkpoints: the demo models in examples/, and files written tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffquant.convert.detect import Match, to_canonical
from diffquant.convert.logical import LogicalSource
from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source
from diffquant.io.importance import Entry, ImportanceMatrix
from diffquant.quant.formats import FORMATS, matrix_shape
from diffquant.quant.types import type_named

EXAMPLES = Path(__file__).parents[2] / "examples"
_NAMES = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "|u1": "U8", "|i1": "I8", "<i8": "I64"}

Stored = tuple[str, tuple[int, ...], np.ndarray]


def stored(value: Any) -> Stored:
    """An array, or (dtype name, array of its bytes or numbers[, shape])."""
    if isinstance(value, np.ndarray):
        return _NAMES[value.dtype.str], value.shape, value
    dtype, array, *shape = value
    return dtype, shape[0] if shape else array.shape, array


def _write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None):
    rows = {key: stored(value) for key, value in tensors.items()}
    specs = [TensorSpec(key, dtype, shape) for key, (dtype, shape, _) in rows.items()]
    with open_sink(path, specs, metadata or {}, force=True) as sink:
        for key, (_, _, array) in rows.items():
            sink.write(key, 0, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        sink.commit()
    return path


def _load(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    with open_source(path) as source:
        found = {k: (s.dtype, s.shape, source.read(k)) for k, s in source.specs.items()}
        return found, dict(source.metadata)


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of demo checkpoints."""
    return EXAMPLES


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """Write a file: (path, key -> array or (dtype, array[, shape]), metadata)."""
    return _write


@pytest.fixture(scope="session")
def load() -> Callable[[Path], tuple[dict[str, Stored], dict[str, Any]]]:
    """Read a whole checkpoint: key -> (dtype, shape, bytes), and its metadata."""
    return _load


@pytest.fixture(scope="session")
def digest() -> Callable[[Path], dict[str, str]]:
    """sha256 of a file, or of every file of a folder."""

    def of(path: Path) -> dict[str, str]:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        return {
            str(one.relative_to(path)): hashlib.sha256(one.read_bytes()).hexdigest()
            for one in files
            if one.is_file()
        }

    return of


def _even_matrix(logical: LogicalSource, match: Match) -> ImportanceMatrix:
    """Ones for every column of the denoiser, for formats that cannot be encoded without."""
    (part,) = (one for one in match.parts if one.name == "denoiser")
    entries = {
        one.target: Entry(np.ones((1, matrix_shape(one.shape)[1])), np.array([1]))
        for one in to_canonical(part)
    }
    return ImportanceMatrix(entries, files=("ones.gguf",))


@pytest.fixture(scope="session")
def matrix_for() -> Callable[[str, LogicalSource, Match], ImportanceMatrix | None]:
    """The importance matrix a type needs on an opened source: None where it can do without."""

    def make(name: str, logical: LogicalSource, match: Match) -> ImportanceMatrix | None:
        needs = {FORMATS[one].importance for one in type_named(name).formats}
        return _even_matrix(logical, match) if "required" in needs else None

    return make
