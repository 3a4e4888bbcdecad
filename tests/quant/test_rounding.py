"""Rounding against brute force, against GPTQ written plainly, and against the formats' decoders."""

import itertools

import numpy as np
import pytest

from diffquant.core.errors import QuantError
from diffquant.quant.backends import backend
from diffquant.quant.codecs.rotation import rotate
from diffquant.quant.formats import FORMATS
from diffquant.quant.rounding.encode import encode
from diffquant.quant.rounding.feedback import DAMPING, carry_of, feedback_codes, nearest_codes
from diffquant.quant.rounding.levels import LEVELS
from diffquant.quant.rounding.packing import blocks_of, columns_of, scales_of, spread

SHAPES = [(128, 256), (3, 64), (5, 40), (7, 33), (1, 1)]


def weights(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(columns, rows=400, seed=1):
    """Covariance of inputs that are strongly correlated, some strong and some weak."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, columns)) @ rng.normal(size=(columns, columns))
    mixed *= np.exp(-np.arange(columns) * 3 / columns)
    return (mixed.T @ mixed / rows).astype(np.float32)


def held(name, shape):
    return not FORMATS[name].check(shape)


def plain(weight, name):
    row = FORMATS[name]
    stats = backend(row.codec, "reduce")(weight, None, fmt=name) if row.passes == 2 else None
    return backend(row.codec, "encode")(weight, stats, fmt=name), stats


def decoded(parts, shape, name):
    return backend(FORMATS[name].codec, "decode")(parts, shape, fmt=name)


def cost(error, h):
    return float(np.trace(error.astype(np.float64) @ h @ error.astype(np.float64).T))


PLAIN = [name for name in LEVELS if not FORMATS[name].rotation]
TURNED = [name for name in LEVELS if FORMATS[name].rotation]
CASES = [(name, shape) for name in PLAIN for shape in SHAPES if held(name, shape)]


@pytest.mark.parametrize("name", PLAIN)
def test_levels_are_what_the_decoder_knows(name):
    row = LEVELS[name]
    assert (np.diff(row.values) > 0).all()
    assert np.isfinite(row.values).all()
    assert len(set(row.codes.tolist())) == row.values.size == row.codes.size
    assert row.values[np.searchsorted(row.values, 0)] == 0
    assert row.values.max() == row.largest


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_parts_have_the_formats_layout(name, shape):
    weight = weights(*shape)
    expected, stats = plain(weight, name)
    carry = carry_of(inputs(shape[1]))
    for found in (encode(weight, stats, fmt=name), encode(weight, stats, fmt=name, carry=carry)):
        assert found.keys() == expected.keys()
        for part, array in expected.items():
            assert (found[part].shape, found[part].dtype) == (array.shape, array.dtype)
        assert np.isfinite(decoded(found, shape, name)).all()


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_the_decoder_finds_the_values_that_feedback_chose(name, shape):
    weight, row = weights(*shape), LEVELS[name]
    _, stats = plain(weight, name)
    carry = carry_of(inputs(shape[1]))
    parts = encode(weight, stats, fmt=name, carry=carry)
    scales = scales_of(parts, shape, name) if row.searches else np.empty(0, np.float32)
    scale = spread(scales, parts, shape, name)
    chosen = row.values[feedback_codes(weight, scale, carry, row)] * scale
    found = decoded(parts, shape, name)
    if name == "int8_bnb":  # multiplied twice
        assert np.allclose(found, chosen, rtol=3e-7, atol=0)
    else:
        assert np.array_equal(found, chosen)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for n, s in CASES if LEVELS[n].searches and not n.endswith("_dq")]
)
def test_no_run_gets_worse_by_search(name, shape, weighted):
    """Block by block, in the error that was asked for; a rounding of the scale apart."""
    weight = weights(*shape, seed=3)
    weigh = np.random.default_rng(4).uniform(0, 2, shape[1]).astype(np.float32)
    importance = weigh if weighted else None
    before, stats = plain(weight, name)
    after = encode(weight, stats, fmt=name, importance=importance)
    per_column = columns_of(importance, shape[1], name).astype(np.float64)
    sums = []
    for parts in (before, after):
        gap = blocks_of(decoded(parts, shape, name) - weight, name).astype(np.float64)
        column = np.arange(gap.size).reshape(gap.shape) % per_column.size
        sums.append((gap**2 * per_column[column]).sum(1))
    assert (sums[1] <= sums[0] * (1 + 1e-6) + 1e-12).all()
    if shape == (128, 256) and name != "mxfp8":
        assert sums[1].sum() < 0.99 * sums[0].sum()


@pytest.mark.parametrize("name", ["nf4_dq", "fp4_dq"])
def test_double_quantized_scales_gain_by_search_too(name):
    weight = weights(128, 256)
    before, stats = plain(weight, name)
    after = encode(weight, stats, fmt=name)
    errors = [((decoded(p, weight.shape, name) - weight) ** 2).sum() for p in (before, after)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", LEVELS)
def test_feedback_lowers_what_an_error_costs(name):
    weight, h = weights(128, 256), inputs(256)
    before, stats = plain(weight, name)
    group = FORMATS[name].rotation
    after = encode(weight, stats, fmt=name, carry=carry_of(h, rotation=group))
    costs = [cost(decoded(p, weight.shape, name) - weight, h) for p in (before, after)]
    assert costs[1] < 0.5 * costs[0]


@pytest.mark.parametrize("name", TURNED)
def test_rotated_values_are_those_that_feedback_chose(name):
    weight, row, group = weights(16, 512), LEVELS[name], FORMATS[name].rotation
    carry = carry_of(inputs(512), rotation=group)
    parts = encode(weight, fmt=name, carry=carry)
    expected, _ = plain(weight, name)
    assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {
        k: (v.shape, v.dtype) for k, v in expected.items()
    }
    scales = scales_of(parts, weight.shape, name) if row.searches else np.empty(0, np.float32)
    scale = spread(scales, parts, weight.shape, name)
    chosen = row.values[feedback_codes(rotate(weight, group), scale, carry, row)] * scale
    grid = parts["s_channel"].max() / 2 if "s_channel" in parts else 0  # W4A8's int8 grid
    found = rotate(decoded(parts, weight.shape, name), group)
    assert np.abs(found - chosen).max() <= grid + 4e-6 * np.abs(chosen).max()


@pytest.mark.parametrize("name", [name for name in TURNED if LEVELS[name].searches])
def test_rotated_rows_gain_by_search(name):
    weight = weights(32, 512)
    before, _ = plain(weight, name)
    after = encode(weight, fmt=name, importance=np.arange(512, dtype=np.float32))
    errors = [((decoded(p, weight.shape, name) - weight) ** 2).sum(1) for p in (before, after)]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.99 * errors[0].sum()


def few_levels():
    """Levels -3 to 3: every rounding of a short row can be tried."""
    row = LEVELS["int8_tensor"]
    pick = np.searchsorted(row.values, np.arange(-3, 4))
    return type(row)(row.values[pick], row.codes[pick], "fixed", 0, "fixed", 3.0)


def test_feedback_is_near_the_best_of_all_roundings():
    """Each of 7^4 roundings of a row is tried: feedback comes most of the way from nearest."""
    row = few_levels()
    tried = np.array(list(itertools.product(row.values, repeat=4)), np.float32)
    sums = np.zeros(3)
    for seed in range(100):
        weight, h = weights(1, 4, seed=seed), inputs(4, seed=seed + 500).astype(np.float64)
        scale = np.ones((1, 4), np.float32)
        fed = row.values[feedback_codes(weight, scale, carry_of(h, damping=1e-6), row)]
        near = row.values[nearest_codes(weight, scale, row)]
        gaps = (tried - weight).astype(np.float64)
        best = np.einsum("nk,kl,nl->n", gaps, h, gaps).min()
        found = cost(fed - weight, h)
        assert found >= best * (1 - 1e-6)
        sums += (best, found, cost(near - weight, h))
    assert sums[1] < sums[0] + 0.5 * (sums[2] - sums[0]), sums


def plain_gptq(weight, scale, h, values):
    """The paper's algorithm, a column at a time: H^-1 loses a row and a column with each."""
    w, k = weight.astype(np.float64).copy(), weight.shape[1]
    left = np.linalg.inv(h + np.eye(k) * DAMPING * np.diagonal(h).mean())
    out, free = np.zeros_like(w), list(range(k))
    for j in np.argsort(-np.diagonal(h), kind="stable"):
        at = free.index(j)
        level = np.abs(w[:, [j]] / scale[:, [j]] - values[None]).argmin(1)
        out[:, j] = values[level] * scale[:, j]
        error = (w[:, j] - out[:, j]) / left[at, at]
        w[:, free] -= error[:, None] * left[at][None]
        left = left - np.outer(left[:, at], left[at]) / left[at, at]
        left = np.delete(np.delete(left, at, 0), at, 1)
        free.pop(at)
    return out


@pytest.mark.parametrize("columns", [9, 64, 300])
def test_feedback_is_the_papers_algorithm(columns):
    """Batches of 128 and one Cholesky factor instead of an inverse per column: the same choices."""
    row = LEVELS["nf4"]
    weight, h = weights(16, columns), inputs(columns, rows=2000)
    scale = np.full(weight.shape, 2.5, np.float32)
    fed = row.values[feedback_codes(weight, scale, carry_of(h), row)] * scale
    expected = plain_gptq(weight, scale, h.astype(np.float64), row.values.astype(np.float64))
    assert (np.abs(fed - expected) > 1e-4).mean() < 0.02  # ties and float32
    assert cost(fed - weight, h) == pytest.approx(cost(expected - weight, h), rel=0.02)


@pytest.mark.parametrize("name", ["nf4", "nvfp4_comfy", "int8_rowwise"])
def test_chunks_of_rows_give_the_bytes_of_the_whole(name):
    weight, carry = weights(256, 192), carry_of(inputs(192))
    _, stats = plain(weight, name)
    whole = encode(weight, stats, fmt=name, carry=carry)["weight"].reshape(-1)
    halves = [encode(weight[s], stats, fmt=name, carry=carry) for s in np.split(np.arange(256), 2)]
    joined = np.concatenate([half["weight"].reshape(-1) for half in halves])
    assert np.array_equal(whole, joined)


@pytest.mark.parametrize("name", LEVELS)
def test_zeros_stay_zeros(name):
    weight = np.zeros((128, 256), np.float32)
    _, stats = plain(weight, name)
    for carry in (None, carry_of(inputs(256))):
        assert not decoded(encode(weight, stats, fmt=name, carry=carry), (128, 256), name).any()


def test_diagonal_blocks_do_not_reach_into_each_other():
    row, weight = LEVELS["nf4"], weights(4, 12)
    scale = np.full(weight.shape, 2.5, np.float32)
    h = inputs(6)
    both = feedback_codes(weight, scale, carry_of(np.stack([h, h])), row)
    apart = [
        feedback_codes(weight[:, s], scale[:, s], carry_of(h), row)
        for s in (slice(0, 6), slice(6, 12))
    ]
    assert np.array_equal(both, np.concatenate(apart, axis=1))


def test_silent_columns_and_few_inputs_are_served():
    """A column without input, and fewer inputs than columns: H has no inverse."""
    rows = weights(3, 16)
    rows[:, 5] = 0
    h = rows.T @ rows / np.float32(3)
    weight, row = weights(4, 16), LEVELS["nf4"]
    scale = np.full(weight.shape, 2.5, np.float32)
    position = feedback_codes(weight, scale, carry_of(h), row)
    near = nearest_codes(weight, scale, row)
    assert np.array_equal(position[:, 5], near[:, 5])
    found, before = (row.values[p] * scale - weight for p in (position, near))
    assert cost(found, h) < cost(before, h)
    silent = feedback_codes(weight, scale, carry_of(np.zeros((16, 16), np.float32)), row)
    assert np.array_equal(silent, near)


def test_a_matrix_that_is_no_covariance_is_refused():
    h = -np.ones((4, 4), np.float32) * 1e6
    np.fill_diagonal(h, 1)
    with pytest.raises(QuantError, match="not positive definite"):
        carry_of(h)


def test_costs_are_the_layers_output():
    rows, error, weight = weights(500, 8), weights(3, 8, seed=5), weights(3, 8, seed=6)
    carry = carry_of((rows.T @ rows / 500).astype(np.float32))
    found = carry.costs(weight, weight + error)
    expected = [((rows @ one.T) ** 2).sum(1).mean() for one in (error, weight)]
    assert found == pytest.approx(expected, rel=1e-5)
