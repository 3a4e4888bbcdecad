"""The mode with importance of every format that has one; test_codecs_oracle.py compares it to ggml.

Golden bytes are ggml's own, so what this module tests without ggml's library is ggml's algorithm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pytest

from diffquant.core.errors import ImportanceRequired, UnsupportedShape
from diffquant.quant.backends import backend
from diffquant.quant.codecs.iq_search import RULES
from diffquant.quant.formats import FORMATS

DEVICES = ("reference", "cpu")
WEIGHED = tuple(name for name, row in FORMATS.items() if row.importance != "unused")
OPTIONAL = tuple(name for name in WEIGHED if FORMATS[name].importance == "optional")
# sha256 of ggml's bytes for weight() and importance(), shortened.
GOLDEN = {
    "q4_0": "2c3c68fbd88c69eb",
    "q4_1": "cfb6d5ec1e6daf7f",
    "q5_0": "4787446b29d08cce",
    "q5_1": "5fa662fa569764f9",
    "q2_k": "e2a6626dad4387cf",
    "q3_k": "e00bc4988b357ddc",
    "q4_k": "7b4ebe45e7dac350",
    "q5_k": "418dc0a2673777ed",
    "q6_k": "06e416c252d67f55",
    "iq4_nl": "db27d934b7b18675",
    "iq4_xs": "f3a59755c8576b08",
    "iq3_s": "860b08b02f1b2e1a",
    "iq3_xxs": "ac923a5b0b3746f4",
    "iq2_s": "506bf1da1063f6ee",
    "iq2_xs": "7ed93337a3f156d9",
    "iq2_xxs": "5ab879ab1085aab0",
}


def encode(
    name: str, weight: np.ndarray, importance: np.ndarray | None, device: str = "cpu"
) -> np.ndarray:
    extra = {} if importance is None else {"importance": importance}
    packed: np.ndarray = backend(name, "encode", device)(weight, fmt=name, **extra)["weight"]
    return packed


def golden_weight() -> np.ndarray:
    """(8, 512) of bell-shaped integers over 4096: the same on every machine and numpy."""
    state = np.arange(8 * 512 * 4, dtype=np.uint32)
    for _ in range(3):
        state = (state ^ (state >> np.uint32(15))) * np.uint32(0x2C1B3C6D) + np.uint32(0x9E3779B9)
    sums = (state >> np.uint32(22)).astype(np.int64).reshape(8, 512, 4).sum(axis=2)
    return ((sums - 2046) / 4096).astype(np.float32)


def golden_importance() -> np.ndarray:
    """(512,) of 0 to 12.5: zeros among them, and no two neighbours alike."""
    return ((np.arange(512) * 37 % 11) ** 2 / 8).astype(np.float32)


def uneven(width: int) -> np.ndarray:
    """Importance as layers have it: a few columns count a hundred times the others."""
    rng = np.random.default_rng(8)
    return np.where(rng.random(width) < 0.1, 100, 1).astype(np.float32)


def gaussian(rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(9)
    return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WEIGHED)
def test_golden_bytes(name: str, device: str) -> None:
    packed = encode(name, golden_weight(), golden_importance(), device)
    assert hashlib.sha256(packed.tobytes()).hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize("name", WEIGHED)
def test_fast_twin_gives_the_references_bytes(
    name: str, awkward: Mapping[str, np.ndarray], importances: Mapping[str, np.ndarray]
) -> None:
    importance = importances["a few columns"]
    for what in ("signed zeros", "blocks of all sizes", "nearly constant", "1e-15", "subnormal"):
        reference, fast = (encode(name, awkward[what], importance, device) for device in DEVICES)
        assert reference.tobytes() == fast.tobytes(), what


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WEIGHED)
def test_chunks_of_rows_give_the_bytes_of_the_whole(name: str, device: str) -> None:
    # 7 rows of 9 super-blocks: columns shift against the kernels' batches from row to row.
    weight, importance = gaussian(7, 2304), uneven(2304)
    whole = encode(name, weight, importance, device)
    for row in range(len(weight)):
        alone = encode(name, weight[row : row + 1], importance, device)
        assert alone.tobytes() == whole[row].tobytes(), row


@pytest.mark.parametrize("name", WEIGHED)
def test_no_rows_are_no_bytes(name: str) -> None:
    whole = encode(name, gaussian(1, 512), uneven(512))
    none = encode(name, np.zeros((0, 512), np.float32), uneven(512))
    assert none.shape == (0, whole.shape[1])


@pytest.mark.parametrize("name", OPTIONAL)
def test_importance_moves_the_error_to_where_it_counts_less(name: str) -> None:
    weight, importance = gaussian(64, 1024), uneven(1024)
    errors = []
    for given in (None, importance):
        packed = encode(name, weight, given)
        decoded = backend(name, "decode")({"weight": packed}, weight.shape, fmt=name)
        errors.append(float((importance * (decoded - weight) ** 2).sum()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WEIGHED)
def test_importance_of_another_length_is_refused(name: str, device: str) -> None:
    with pytest.raises(UnsupportedShape, match="importance"):
        encode(name, gaussian(2, 512), np.ones(256, np.float32), device)


@pytest.mark.parametrize("name", [n for n in WEIGHED if n not in OPTIONAL])
def test_formats_that_need_importance_say_so(name: str) -> None:
    with pytest.raises(ImportanceRequired, match=name):
        encode(name, gaussian(2, 512), None)


@pytest.mark.parametrize("size", [1e13, 1e19, 1e30])
@pytest.mark.parametrize("name", RULES)
def test_distances_that_overflow_choose_as_the_reference(name: str, size: float) -> None:
    weight = gaussian(8, 512) * np.float32(size)
    found, wanted = (
        encode(name, weight, np.ones(512, np.float32), d) for d in ("cpu", "reference")
    )
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("name", WEIGHED)
def test_values_that_overflow_do_not_crash(name: str, value: float, device: str) -> None:
    weight = gaussian(5, 512)
    weight[1, 3], weight[2], weight[3, ::2] = value, value, -value
    for importance in (uneven(512), np.full(512, 3e38, np.float32), np.zeros(512, np.float32)):
        assert encode(name, weight, importance, device).shape[0] == 5
