"""Files written tensor by tensor, with bytes made by hand where another writer is wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink

_NAMES = {"<f4": "F32", "<f2": "F16", "|u1": "U8", "|i1": "I8", "<i8": "I64", "<u2": "BF16"}


def _write(path: Path, tensors, metadata=None) -> Path:
    """Write key -> array, or key -> (dtype, shape, bytes)."""
    rows = {
        key: value
        if isinstance(value, tuple)
        else (_NAMES[value.dtype.str], value.shape, value.reshape(-1).view(np.uint8))
        for key, value in tensors.items()
    }
    specs = [TensorSpec(key, dtype, shape) for key, (dtype, shape, _) in rows.items()]
    with open_sink(path, specs, metadata or {}, force=True) as sink:
        for key, (_, _, data) in rows.items():
            sink.write(key, 0, np.frombuffer(bytes(data), np.uint8))
        sink.commit()
    return path


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """Write a file: (path, key -> array or (dtype, shape, bytes), metadata)."""
    return _write


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of demo checkpoints."""
    return Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def q8_blocks() -> Callable[..., bytes]:
    """q8_0 of a matrix, by hand; `levels` other than 127 is another scale rule."""

    def blocks(weight: np.ndarray, levels: float = 127.0) -> bytes:
        rows = weight.reshape(-1, 32)
        scale = (np.abs(rows).max(axis=1, keepdims=True) / levels).astype(np.float16)
        numbers = np.rint(rows / np.maximum(scale.astype(np.float32), 1e-12)).astype(np.int8)
        return np.concatenate([scale.view(np.uint8), numbers.view(np.uint8)], axis=1).tobytes()

    return blocks
