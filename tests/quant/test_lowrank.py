"""Factors of low rank against numpy's own decomposition, and against the objective spelled out."""

import tracemalloc

import numpy as np
import pytest

from diffquant.quant.lowrank import best_factors, live_nbytes, noise

# decomposed whole (twice), within the space of its columns, and by Krylov
SHAPES = [(40, 90), (200, 64), (700, 200), (600, 900)]


def rounding_error(shape, seed=0):
    """What rounding to whole numbers takes: the flat spectrum that errors have."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 4
    return values - np.round(values)


def covariance(columns, seed=1):
    """Mean of x x^T over inputs whose columns differ in size."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((3 * columns, columns)) * np.exp(rng.standard_normal(columns))
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def best_energy(matrix, rank):
    """Squared size of the best approximation of that rank: Eckart and Young."""
    return float((np.linalg.svd(matrix, compute_uv=False)[:rank] ** 2).sum())


def objective(error, h):
    return float(np.trace(error @ h @ error.T))


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_take_what_the_best_approximation_takes(shape, rank):
    error = rounding_error(shape)
    up, down = best_factors(error, rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    assert up.dtype == down.dtype == np.float32
    exact = error.astype(np.float64)
    taken = (exact**2).sum() - ((exact - up.astype(np.float64) @ down) ** 2).sum()
    least = 1 - 1e-5 if min(shape) <= 256 else 0.97
    assert least <= taken / best_energy(exact, rank) <= 1 + 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_weighed_factors_solve_the_weighed_problem(shape):
    error, h = rounding_error(shape), covariance(shape[1])
    exact, wide = error.astype(np.float64), h.astype(np.float64)
    root = np.linalg.cholesky(wide)
    best = best_energy(exact @ root, 8)
    weighed, plain = (best_factors(error, 8, weigh=weigh) for weigh in (h, None))
    rests = [objective(exact - up @ down, wide) for up, down in (weighed, plain)]
    taken = objective(exact, wide) - rests[0]
    assert 0.99 <= taken / best <= 1 + 1e-5
    assert rests[0] < 0.9 * rests[1]


@pytest.mark.parametrize("shape", [(200, 64), (700, 400)])
def test_diagonal_and_blocks_are_covariances(shape):
    error, columns = rounding_error(shape), shape[1]
    squares = np.exp(np.random.default_rng(3).standard_normal(columns)).astype(np.float32)
    whole = covariance(columns)
    half = columns // 2
    blocks = np.stack([whole[:half, :half], whole[half:, half:]])
    padded = np.zeros_like(whole)
    padded[:half, :half], padded[half:, half:] = blocks
    for short, dense in ((squares, np.diag(squares)), (blocks, padded)):
        found = best_factors(error, 8, weigh=short)
        wanted = best_factors(error, 8, weigh=dense)
        np.testing.assert_allclose(found[0] @ found[1], wanted[0] @ wanted[1], atol=2e-3)
        assert noise(error, *found, weigh=short) == pytest.approx(
            (objective(error, dense), objective(error - found[0] @ found[1], dense)), rel=1e-3
        )


@pytest.mark.parametrize("shape", [(90, 70), (500, 400)])
def test_an_error_of_low_rank_is_taken_whole(shape):
    rng = np.random.default_rng(0)
    error = (rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))).astype("f4")
    up, down = best_factors(error, 8)
    np.testing.assert_allclose(up @ down, error, atol=1e-4 * np.abs(error).max())
    before, after = noise(error, up, down)
    assert after < 1e-8 * before


@pytest.mark.parametrize(
    ("shape", "rank", "alive"), [((1536, 256), 256, 512), ((600, 500), 8, 5), ((900, 400), 64, 70)]
)
def test_dead_rows_leave_fewer_directions_than_are_sought(shape, rank, alive):
    """Later blocks of the search are noise then, and must not count twice."""
    error = rounding_error(shape)
    error[alive:] = 0
    up, down = best_factors(error, rank)
    exact = error.astype(np.float64)
    taken = (exact**2).sum() - ((exact - up.astype(np.float64) @ down) ** 2).sum()
    assert taken == pytest.approx(best_energy(exact, rank), rel=1e-4)


def test_no_error_gives_factors_that_add_nothing():
    up, down = best_factors(np.zeros((300, 50), np.float32), 4)
    assert not (up @ down).any()
    assert np.isfinite(up).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_share_their_size_and_have_a_sign(shape):
    up, down = best_factors(rounding_error(shape), 8)
    np.testing.assert_allclose(np.linalg.norm(up, axis=0), np.linalg.norm(down, axis=1), rtol=1e-3)
    assert (up[np.abs(up).argmax(axis=0), np.arange(8)] > 0).all()


def test_the_seed_decides_the_bytes():
    error = rounding_error((600, 900))
    again = [best_factors(error, 8, seed=seed)[0].tobytes() for seed in (7, 7, 8)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize("shape", [(200, 900), (3000, 200), (3000, 700), (700, 3000)])
def test_memory_is_what_the_plan_says(shape):
    error = rounding_error(shape)
    best_factors(error, 8)
    tracemalloc.start()
    try:
        best_factors(error, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= live_nbytes(shape, 8)


def test_memory_is_that_of_thin_matrices():
    rows, columns = 12288, 3072
    assert live_nbytes((rows, columns), 32) < rows * columns * 4
