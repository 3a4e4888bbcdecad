"""Checkpoints of real names and widths with random weights: clients fix widths in their code."""

from __future__ import annotations

import json
import lzma
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink

DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"
EXAMPLES = Path(__file__).parents[2] / "examples"
_LATER_BLOCKS = re.compile(r"(blocks|layers)\.([1-9]|0\d)")
Shapes = Mapping[str, tuple[int, ...]]


def quiet(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Clients warn on import and on use; that is not what is judged here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def shapes_of(manifest: str, *, shallow: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a real model; `shallow` keeps the first block of each kind."""
    found = json.loads(lzma.decompress(DATA.read_bytes()))[manifest]
    return {
        key: tuple(shape)
        for key, shape in found.items()
        if not (shallow and _LATER_BLOCKS.search(key))
    }


def _values(key: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
    """Weights that keep a signal's size: variance 1 / fan-in; norms 1, biases 0."""
    size = math.prod(shape)
    if len(shape) < 2:
        fill = 1.0 if key.endswith(("weight", "scale")) else 0.0
        return np.full(size, fill, np.float32)
    deviation = 0.02 if "embedding" in key else 1 / math.sqrt(size // shape[0])
    return np.resize(noise, size) * np.float32(deviation)


def write_random(path: Path, shapes: Shapes, dtype: str = "F16") -> Path:
    """Write a checkpoint of random weights, tensor by tensor."""
    noise = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    specs = [
        TensorSpec(key, "I64" if "position_ids" in key else dtype, shape)
        for key, shape in shapes.items()
    ]
    with open_sink(path, specs, {}) as sink:
        for index, spec in enumerate(specs):
            if spec.dtype == "I64":
                data = np.arange(spec.size, dtype="<i8")
            else:
                values = _values(spec.key, spec.shape, noise[index % 1009 :])
                wide = values.view("<u4") >> 16
                data = values.astype("<f2") if dtype == "F16" else wide.astype("<u2")
            sink.write(spec.key, 0, data.view(np.uint8))
        sink.commit()
    return path


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of demo checkpoints."""
    return EXAMPLES


@pytest.fixture(scope="session")
def client() -> Callable[[str], Any]:
    """Import a client's module by name, or skip."""
    return lambda name: quiet(pytest.importorskip, name)


@pytest.fixture(scope="session")
def silently() -> Callable[..., Any]:
    """Call a client's function without its warnings."""
    return quiet


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Write a model of the manifests with random weights, once a module; removed at its end."""
    folder = tmp_path_factory.mktemp("random")

    def make(manifest: str, *, shallow: bool = False, dtype: str = "F16") -> Path:
        path = folder / f"{manifest}.safetensors"
        if not path.exists():
            write_random(path, shapes_of(manifest, shallow=shallow), dtype)
        return path

    yield make
    shutil.rmtree(folder)
