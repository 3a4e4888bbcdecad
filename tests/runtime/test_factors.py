"""The low-rank factors of another device are those of the processor, but for rounding."""

import numpy as np
import pytest
import torch

from diffquant.quant.lowrank import best_factors
from diffquant.runtime.factors import _factors, factors_on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((40, 24), 24), ((24, 40), 3), ((600, 500), 4), ((500, 900), 8), ((300, 1), 1)],
)
def test_a_device_finds_the_same_factors(device, shape, rank):
    if device != "cpu" and not torch.cuda.is_available():
        pytest.skip("no such device here")
    rng = np.random.default_rng(0)
    spectrum = np.geomspace(1, 1e-3, min(shape)).astype(np.float32)
    left, right = (np.linalg.qr(rng.standard_normal((n, min(shape))))[0] for n in shape)
    matrix = np.asarray((left * spectrum) @ right.T, np.float32)
    ours = _factors(matrix, rank, seed=1, device=torch.device(device))
    theirs = best_factors(matrix, rank, seed=1)
    np.testing.assert_allclose(ours[0] @ ours[1], theirs[0] @ theirs[1], atol=2e-5)
    exact = float((spectrum[rank:].astype(np.float64) ** 2).sum())
    left_over = float(np.square(matrix - ours[0] @ ours[1], dtype=np.float64).sum())
    assert left_over <= 1.001 * exact + 1e-9
    np.testing.assert_allclose(
        np.linalg.norm(ours[0], axis=0), np.linalg.norm(ours[1], axis=1), rtol=1e-3, atol=1e-6
    )


def test_a_matrix_of_lower_rank_than_asked_for_has_zeros():
    matrix = np.outer(np.arange(1, 500), np.ones(400)).astype(np.float32)
    up, down = _factors(matrix, 4, device=torch.device("cpu"))
    np.testing.assert_allclose(up @ down, matrix, atol=1e-5 * matrix.max())


def test_the_processor_has_its_own():
    assert factors_on("cpu") is best_factors
