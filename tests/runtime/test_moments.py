"""Means and covariances of inputs against float64 sums over torch's own patches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from diffquant.core.errors import VerificationError
from diffquant.runtime import moments
from diffquant.runtime.calibrate import calibrate
from diffquant.runtime.layers import PackedWeight, QuantConv2d, QuantLinear
from diffquant.runtime.moments import Moments, rows_seen

FLUX = Path(__file__).parents[2] / "examples" / "flux1-shapes"


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def collected(layer, *inputs):
    found = Moments()
    with found.hooked([("a.weight", layer)]):
        for x in inputs:
            layer(x)
    return found.inputs()["a.weight"]


def bound(layer, *shape):
    layer.bind(PackedWeight.of(torch.ones(shape)))
    return layer


def test_a_linear_layer_averages_over_every_token():
    inputs = randn(2, 5, 7), randn(1, 3, 7)
    found = collected(bound(QuantLinear(7, 3, bias=False), 3, 7), *inputs)
    rows = torch.cat([x.reshape(-1, 7) for x in inputs]).double()
    assert found.count == 13
    assert found.mean == pytest.approx(rows.mean(0).numpy(), rel=1e-5, abs=1e-7)
    expected = (rows.T @ rows / 13).numpy()
    assert np.allclose(found.covariance, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1)])
def test_a_convolution_averages_over_every_patch(kernel, stride, padding):
    layer = QuantConv2d(4, 6, kernel, stride=stride, padding=padding)
    layer.bias = None
    x = randn(2, 4, 7, 10)
    found = collected(bound(layer, 6, 4, kernel, kernel), x)
    patches = functional.unfold(x.double(), kernel, padding=padding, stride=stride)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    assert found.count == len(rows)
    assert found.mean == pytest.approx(rows.mean(0).numpy(), rel=1e-5, abs=1e-6)
    expected = (rows.T @ rows / len(rows)).numpy()
    assert np.allclose(found.covariance, expected, rtol=1e-5, atol=1e-6)


def test_covariance_explains_what_an_error_costs():
    """tr(E H E^T) is the mean square of what the layer's output changes by."""
    layer, x, error = bound(QuantLinear(6, 4, bias=False), 4, 6), randn(50, 6), randn(4, 6)
    h = collected(layer, x).covariance
    cost = np.trace(error.numpy() @ h @ error.numpy().T)
    assert cost == pytest.approx(float((x @ error.T).square().sum(1).mean()), rel=1e-5)


def test_wide_layers_keep_blocks(monkeypatch):
    monkeypatch.setattr("diffquant.io.inputs.LARGEST_BLOCK", 4)
    x = randn(9, 6)
    found = collected(bound(QuantLinear(6, 1, bias=False), 1, 6), x)
    whole = (x.double().T @ x.double() / 9).numpy()
    assert found.covariance.shape == (2, 3, 3)
    assert np.allclose(found.covariance[1], whole[3:, 3:], rtol=1e-5, atol=1e-6)


def test_large_inputs_are_cut(monkeypatch):
    monkeypatch.setattr(moments, "_ROWS", 4)
    layer = QuantConv2d(2, 1, 3, padding=1)
    assert [len(rows) for rows in rows_seen(layer, randn(1, 2, 3, 3))] == [4, 4, 1]


def test_an_input_that_is_not_finite_is_refused():
    found = Moments()
    layer = bound(QuantLinear(2, 1, bias=False), 1, 2)
    with found.hooked([("a.weight", layer)]):
        layer(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(VerificationError, match="not finite"):
        found.flush()


def test_the_diagonal_is_the_importance_matrix(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path))
    found = calibrate(FLUX, ("a red circle",), steps=2, size=(64, 64), moments=True)
    assert set(found.inputs) == set(found.matrix.entries)
    assert found.architecture == "flux1"
    for key, one in found.inputs.items():
        diagonal = np.diagonal(one.covariance)
        assert np.allclose(diagonal, found.matrix.entries[key].values(), rtol=1e-4)
        assert one.count == found.matrix.entries[key].counts[0]
