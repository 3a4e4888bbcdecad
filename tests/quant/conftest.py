"""Weights that are awkward to quantize, and ggml's own library as the judge of bytes."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from awkward_weights import awkward_weights, importance_rows

from diffquant.core.dtypes import STORAGE


@pytest.fixture(scope="session")
def awkward() -> Mapping[str, np.ndarray]:
    """Finite float32 (96, 1024) weights by what is awkward about them."""
    return awkward_weights()


@pytest.fixture(scope="session")
def importances() -> Mapping[str, np.ndarray]:
    """Importance rows of COLUMNS values: ones as sd.cpp passes, and such as layers really have."""
    return importance_rows()


@pytest.fixture(scope="session")
def ggml_library() -> ctypes.CDLL:
    """ggml's own library."""
    found = importlib.util.find_spec("pywhispercpp")
    if found is None or found.origin is None:
        pytest.skip("pywhispercpp, which carries ggml's library, is not installed")
    libraries = sorted(
        (Path(found.origin).parent.parent / "pywhispercpp.libs").glob("libggml-base*")
    )
    if not libraries:
        pytest.skip("this platform's pywhispercpp carries no separate ggml library")
    return ctypes.CDLL(str(libraries[0]))


@pytest.fixture(scope="session")
def ggml_encode(ggml_library: ctypes.CDLL) -> Callable[..., np.ndarray]:
    """ggml_quantize_chunk: (format, weight, importance or None) -> uint8 (R, bytes per row)."""
    library = ggml_library
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]

    def encode(name: str, weight: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        storage = STORAGE[name.upper()]
        rows, columns = weight.shape
        packed = np.empty((rows, columns // storage.block_size * storage.block_nbytes), np.uint8)
        library.ggml_quantize_init(storage.ggml_id)
        columns_at = None if importance is None else importance.ctypes.data
        written = library.ggml_quantize_chunk(
            storage.ggml_id, weight.ctypes.data, packed.ctypes.data, 0, rows, columns, columns_at
        )
        assert written == packed.nbytes
        return packed

    return encode


@pytest.fixture(scope="session")
def ggml_decode(ggml_library: ctypes.CDLL) -> Callable[..., np.ndarray]:
    """dequantize_row_*: (format, packed uint8 (R, bytes per row), columns) -> float32 (R, K)."""

    def decode(name: str, packed: np.ndarray, columns: int) -> np.ndarray:
        function = ggml_library[f"dequantize_row_{name.replace('_k', '_K')}"]
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        function.restype = None
        weight = np.empty((len(packed), columns), np.float32)
        function(packed.ctypes.data, weight.ctypes.data, weight.size)
        return weight

    return decode
