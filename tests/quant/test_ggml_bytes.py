"""Every ggml type, both modes, many distributions: the bytes of ggml's own library.

2,000 blocks of each distribution; marked slow, 20,000. `awkward` weights and the plain references
are test_codecs_oracle.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from diffquant.core.dtypes import STORAGE
from diffquant.io import open_source
from diffquant.quant.backends import backend
from diffquant.quant.formats import FORMATS

pytestmark = pytest.mark.oracle

EXAMPLES = Path(__file__).parents[2] / "examples"
BLOCKS_PER_ROW = 8
GGML = [
    row.name
    for row in FORMATS.values()
    if row.encodes and row.name.upper() in STORAGE and STORAGE[row.name.upper()].is_block
]
MODES = [
    *((name, False) for name in GGML if FORMATS[name].importance != "required"),
    *((name, True) for name in GGML if FORMATS[name].importance != "unused"),
]


def trained(rows: int, columns: int) -> np.ndarray:
    """Weights of the Flux demo's transformer, repeated to size."""
    found: list[np.ndarray] = []
    with open_source(EXAMPLES / "flux1-shapes") as source:
        for key, spec in source.specs.items():
            if key.startswith("transformer/") and len(spec.shape) == 2 and spec.dtype == "BF16":
                bits = source.read(key).view("<u2").astype(np.uint32) << np.uint32(16)
                found.append(bits.view(np.float32))
    assert found, "the demo checkpoint is stored in bfloat16"
    return np.resize(np.concatenate(found), (rows, columns))


def distributions(rows: int, columns: int) -> Iterator[tuple[str, np.ndarray]]:
    """Named float32 (rows, columns) weights."""
    rng = np.random.default_rng(21)
    f = np.float32
    normal = rng.standard_normal((rows, columns), dtype=np.float32)
    yield "gaussian", normal * f(0.02)
    yield "heavy tails", rng.standard_t(2, (rows, columns)).astype(np.float32)
    yield "constant", np.repeat(normal[:, :1], columns, axis=1)
    yield "zeros", np.zeros((rows, columns), np.float32)
    yield "sparse", np.where(rng.random((rows, columns)) < 0.05, normal, f(0))
    yield "tiny", normal * f(1e-20)
    yield "huge", normal * f(1e3)
    yield "denormal", normal * f(1e-40)
    outliers = normal * f(0.02)
    outliers[:, 7::97] *= f(40)
    yield "outlier channels", outliers
    yield "uniform", rng.random((rows, columns), dtype=np.float32) - f(0.5)
    yield (
        "mixed magnitudes",
        normal * np.exp(rng.standard_normal((rows, 1), dtype=np.float32) * f(4)),
    )
    yield "trained", trained(rows, columns)


def hold_against_ggml(
    name: str, weighed: bool, blocks: int, ggml_encode: Callable[..., np.ndarray]
) -> None:
    storage = STORAGE[name.upper()]
    columns = storage.block_size * BLOCKS_PER_ROW
    rows = blocks // BLOCKS_PER_ROW
    squares = np.random.default_rng(22).standard_normal(columns, dtype=np.float32) ** 2
    importance = squares if weighed else None
    extra = {"importance": importance} if weighed else {}
    encode = backend(name, "encode")
    for what, weight in distributions(rows, columns):
        found = encode(weight, fmt=name, **extra)["weight"]
        expected = ggml_encode(name, weight, importance)
        shape = (blocks, storage.block_nbytes)
        differ = (found.reshape(shape) != expected.reshape(shape)).any(axis=1)
        assert not differ.any(), f"{what}: {int(differ.sum())} of {blocks} blocks differ"


@pytest.mark.parametrize(("name", "weighed"), MODES)
def test_two_thousand_blocks_of_each_distribution(
    name: str, weighed: bool, ggml_encode: Callable[..., np.ndarray]
) -> None:
    hold_against_ggml(name, weighed, 2_000, ggml_encode)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "weighed"), MODES)
def test_twenty_thousand_blocks_of_each_distribution(
    name: str, weighed: bool, ggml_encode: Callable[..., np.ndarray]
) -> None:
    hold_against_ggml(name, weighed, 20_000, ggml_encode)
