"""Weights that are awkward to quantize, and ggml's own library as the judge of bytes."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from diffquant.core.dtypes import STORAGE

ROWS, COLUMNS = 96, 1024


def _awkward_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    f = np.float32

    def normal() -> np.ndarray:
        return rng.standard_normal((ROWS, COLUMNS), dtype=np.float32)

    def by_block(block: int) -> np.ndarray:
        return rng.standard_normal((ROWS, COLUMNS // block), dtype=np.float32).repeat(block, axis=1)

    outliers = normal()
    outliers[:, ::37] *= f(50)
    half_zero = normal() * (rng.random((ROWS, COLUMNS)) < 0.5)
    signed_zeros = normal() * (rng.random((ROWS, COLUMNS)) < 0.03)  # mostly +0 and -0
    return {
        "gaussian": normal() * f(0.02),
        "heavy tails": rng.standard_t(2, (ROWS, COLUMNS)).astype(np.float32),
        "outlier columns": outliers,
        "half zero": half_zero.astype(np.float32),
        "signed zeros": signed_zeros.astype(np.float32),
        "zeros": np.zeros((ROWS, COLUMNS), np.float32),
        "negative zeros": -np.zeros((ROWS, COLUMNS), np.float32),
        "constant rows": np.repeat(
            rng.standard_normal((ROWS, 1), dtype=np.float32), COLUMNS, axis=1
        ),
        "constant blocks": by_block(32),
        "two values": np.where(rng.random((ROWS, COLUMNS)) < 0.5, f(-0.7), f(0.7)),
        "integers": rng.integers(-8, 9, (ROWS, COLUMNS)).astype(np.float32),
        "subnormal": normal() * f(1e-40),
        "smallest subnormal": normal() * f(1e-43),
        "1e-30": normal() * f(1e-30),
        "1e-15": normal() * f(1e-15),
        "1e-7": normal() * f(1e-7),
        "1e-5": normal() * f(1e-5),
        "1e4": normal() * f(1e4),
        "blocks of all sizes": normal() * np.exp(by_block(16) * f(6)),
        "elements of all sizes": normal() * np.exp(normal() * f(5)),
        "positive": np.abs(normal()) + f(1),
        "negative": -np.abs(normal()) - f(1),
        "nearly constant": f(1) + normal() * f(1e-6),
        "nearly constant negative": f(-1) + normal() * f(1e-6),
        "from bf16": (normal().view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
        "from f16": normal().astype(np.float16).astype(np.float32),
    }


@pytest.fixture(scope="session")
def awkward() -> Mapping[str, np.ndarray]:
    """Finite float32 (96, 1024) weights by what is awkward about them."""
    return _awkward_weights()


@pytest.fixture(scope="session")
def importances() -> Mapping[str, np.ndarray]:
    """Importance rows of COLUMNS values: ones as sd.cpp passes, and such as layers really have."""
    rng = np.random.default_rng(12)
    squares = rng.standard_normal(COLUMNS, dtype=np.float32) ** 2
    return {
        "ones": np.ones(COLUMNS, np.float32),
        "mean squares": squares,
        "a few columns": np.where(rng.random(COLUMNS) < 0.1, squares, np.float32(0)),
        "of all sizes": np.exp(rng.standard_normal(COLUMNS, dtype=np.float32) * np.float32(5)),
    }


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
