"""Errors are what their definitions say, whole or in chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffquant.quant.metrics import ErrorStats, verdict_of


def stats_of(reference: np.ndarray, decoded: np.ndarray) -> ErrorStats:
    stats = ErrorStats()
    stats.add(reference, decoded)
    return stats


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_definitions(dtype: type) -> None:
    x, y = np.array([[3.0, 4.0]], dtype), np.array([3.0, 3.0], dtype)
    stats = stats_of(x, y)
    assert stats.count == 2
    assert stats.relative_rmse == pytest.approx(0.2)
    assert (stats.reference, stats.decoded, stats.noise) == (25.0, 18.0, 1.0)


@pytest.mark.parametrize("size", [1, 63, 64, 1000, 4096 + 17])
def test_float32_sums_equal_float64(size: int) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(size, dtype=np.float32)
    y = x + rng.standard_normal(size, dtype=np.float32) * np.float32(0.01)
    fast, plain = stats_of(x, y), stats_of(x.astype(np.float64), y.astype(np.float64))
    assert fast.count == plain.count == size
    for name in ("reference", "decoded", "noise"):
        assert getattr(fast, name) == pytest.approx(getattr(plain, name), rel=1e-12)


def test_chunks_and_merged_workers_equal_the_whole() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 77), dtype=np.float32)
    y = np.round(x * 8) / np.float32(8)
    whole, chunked, other = stats_of(x, y), ErrorStats(), ErrorStats()
    for start in range(0, 30, 7):
        stop = min(start + 7, 30)
        chunked.add(x[start:stop], y[start:stop])
    other.add(x[30:], y[30:])
    chunked.merge(other)
    assert chunked.count == whole.count
    assert chunked.relative_rmse == pytest.approx(whole.relative_rmse, rel=1e-12)
    assert chunked.decoded == pytest.approx(whole.decoded, rel=1e-12)


def test_equal_tensors_are_exact_even_when_zero() -> None:
    for value in (0.0, 1.5):
        stats = stats_of(np.full(9, value, np.float32), np.full(9, value, np.float32))
        assert stats.relative_rmse == 0.0
    assert ErrorStats().relative_rmse == 0.0


def test_zeros_decoded_to_something_are_infinitely_wrong() -> None:
    stats = stats_of(np.zeros(4, np.float32), np.ones(4, np.float32))
    assert stats.relative_rmse == math.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_fail(value: float, dtype: type) -> None:
    x = np.ones(100, dtype)
    y = x.copy()
    assert stats_of(x, y).finite
    y[7] = value
    stats = stats_of(x, y)
    assert not stats.finite
    assert verdict_of(stats.relative_rmse, 0.1) == "fail"


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="3 elements, decoded 4"):
        stats_of(np.zeros(3, np.float32), np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("error", "expected", "verdict"),
    [
        (0.0, 0.0, "pass"),
        (1e-7, 0.0, "pass"),
        (1e-3, 0.0, "fail"),
        (0.149, 0.1, "pass"),
        (0.151, 0.1, "warn"),
        (0.299, 0.1, "warn"),
        (0.301, 0.1, "fail"),
        (math.nan, 0.1, "fail"),
        (math.inf, 0.1, "fail"),
    ],
)
def test_verdicts(error: float, expected: float, verdict: str) -> None:
    assert verdict_of(error, expected) == verdict
