"""The power of gradients against autograd's own, made whole."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from diffquant.core.errors import VerificationError
from diffquant.runtime.gradients import GradientPower, Power, probe_sums, recomputed
from diffquant.runtime.layers import PackedWeight, QuantConv2d, QuantLinear


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear(inputs, outputs, seed=0):
    layer = QuantLinear(inputs, outputs, bias=False)
    layer.bind(PackedWeight.of(randn(outputs, inputs, seed=seed)))
    return layer


class Two(nn.Module):
    """Two layers, the first called twice, as a denoiser is by its steps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = linear(6, 4), linear(4, 3, seed=1)

    def forward(self, x, *, scale):
        return self.second(torch.tanh(self.first(x))) * scale


def whole_gradients(model, xs, direction):
    """Autograd's gradients of both weights, without hooks."""
    weights = [
        layer.weight(torch.float32).requires_grad_() for layer in (model.first, model.second)
    ]
    total = sum(
        torch.tanh(x @ weights[0].T) @ weights[1].T * scale
        for x, scale in zip(xs, (1.0, 0.5), strict=True)
    )
    return torch.autograd.grad((total * direction).sum(), weights)


def differentiate(power, model, xs, direction):
    with torch.enable_grad():
        made = sum(model(x, scale=scale) for x, scale in zip(xs, (1.0, 0.5), strict=True))
        (made * direction).sum().backward()
    power.finish_picture()


def test_probes_meet_the_gradient_of_a_linear_layer():
    layer, x, gradient = linear(7, 5), randn(2, 3, 7), randn(2, 3, 5)
    d, e = randn(5, 8), randn(8, 7)
    whole = gradient.reshape(-1, 5).T @ x.reshape(-1, 7)
    rows, columns = probe_sums(layer, x, gradient, d, e)
    torch.testing.assert_close(rows, whole @ e.T)
    torch.testing.assert_close(columns, d.T @ whole)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (3, 2, 1), (3, 2, 0)]
)
def test_probes_meet_the_gradient_of_a_convolution(kernel, stride, padding):
    layer = QuantConv2d(4, 6, kernel, stride=stride, padding=padding, bias=False)
    x, weight = randn(2, 4, 7, 10), randn(6, 4, kernel, kernel).requires_grad_()
    y = functional.conv2d(x, weight, None, stride, padding)
    gradient = randn(*y.shape)
    (whole,) = torch.autograd.grad((y * gradient).sum(), weight)
    d, e = randn(6, 8), randn(8, 4 * kernel * kernel)
    rows, columns = probe_sums(layer, x, gradient, d, e)
    torch.testing.assert_close(rows, whole.reshape(6, -1) @ e.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(columns, d.T @ whole.reshape(6, -1), rtol=1e-4, atol=1e-4)


def test_power_is_the_mean_square_of_the_whole_gradient():
    model = Two()
    xs, direction = (randn(5, 6), randn(5, 6, seed=9)), randn(5, 3)
    power = GradientPower({"first": model.first, "second": model.second})
    with power.hooked(), recomputed(model):
        for _ in range(100):  # the same picture, other signs: 800 probes
            differentiate(power, model, xs, direction)
    for key, whole in zip(power.layers, whole_gradients(model, xs, direction), strict=True):
        found, squares = power.power(key), whole.double().square().numpy()
        assert found.rows == pytest.approx(squares.sum(1), rel=0.25)
        assert found.columns == pytest.approx(squares.sum(0), rel=0.25)
        assert found.total == pytest.approx(squares.sum(), rel=0.1)


def test_steps_add_up_before_they_are_squared():
    layer = linear(4, 3)
    power = GradientPower({"layer": layer})
    x = randn(2, 4)
    with power.hooked(), torch.enable_grad():
        (layer(x) - layer(x)).sum().backward()
    power.finish_picture()
    assert power.power("layer").total == 0


def test_rows_that_nothing_reads_have_no_power():
    model = Two()
    weight = randn(3, 4)
    weight[:, 2] = 0
    model.second.bind(PackedWeight.of(weight))
    power = GradientPower({"first": model.first})
    with power.hooked():
        differentiate(power, model, (randn(5, 6), randn(5, 6)), randn(5, 3))
    rows = power.power("first").rows
    assert rows[2] == 0
    assert (rows[[0, 1, 3]] > 0).all()


def test_a_layer_that_is_never_called_has_none():
    power = GradientPower({"idle": linear(4, 3)})
    found = power.power("idle")
    assert (found.rows.shape, found.columns.shape, found.total) == ((3,), (4,), 0.0)
    assert found.weigh(np.ones((3, 4))) == 0


def test_recomputing_changes_no_number_and_is_undone():
    model, x = Two(), randn(5, 6).requires_grad_()
    forward = model.forward
    (plain,) = torch.autograd.grad(model(x, scale=2.0).sum(), x)
    with recomputed(model):
        made = model(x, scale=2.0)
        made.sum().backward()
        with torch.no_grad():
            assert torch.equal(model(x, scale=2.0), made)
    assert torch.equal(x.grad, plain)
    assert model.forward == forward


def test_hooks_leave_outputs_alone_and_go():
    model, x = Two(), randn(5, 6)
    before = model(x, scale=1.0)
    power = GradientPower({"first": model.first})
    with power.hooked():
        assert torch.equal(model(x, scale=1.0).detach(), before)
    assert not model.first._forward_hooks


def test_the_same_seed_gives_the_same_numbers():
    totals = []
    for seed in (1, 1, 2):
        model = Two()
        power = GradientPower({"first": model.first}, seed)
        with power.hooked():
            differentiate(power, model, (randn(5, 6), randn(5, 6)), randn(5, 3))
        totals.append(power.power("first").total)
    assert totals[0] == totals[1] != totals[2]


def test_a_gradient_that_is_not_finite_is_refused():
    layer = linear(2, 1)
    power = GradientPower({"layer": layer})
    with power.hooked(), torch.enable_grad():
        (layer(torch.tensor([[1.0, 2.0]])) * float("inf")).sum().backward()
    with pytest.raises(VerificationError, match=r"layer: its gradient is not finite"):
        power.finish_picture()


def test_errors_are_weighed_by_row_and_column():
    power = Power(np.array([3.0, 1.0]), np.array([1.0, 2.0, 1.0]))
    squares = np.array([[1.0, 0, 0], [0, 10.0, 0]])
    assert power.weigh(squares) == pytest.approx((3 * 1 + 1 * 2 * 10) / 4)


def test_coherence_is_that_of_the_whole_gradient():
    model = Two()
    xs, direction = (randn(5, 6), randn(5, 6, seed=9)), randn(5, 3)
    power = GradientPower({"first": model.first, "second": model.second})
    with power.hooked(), recomputed(model):
        for _ in range(100):
            differentiate(power, model, xs, direction)
    for key, whole in zip(power.layers, whole_gradients(model, xs, direction), strict=True):
        g = whole.double().numpy()
        rows, columns = g @ g.T, g.T @ g
        along = np.sign(g).astype(np.float32)
        for error in (along, along[:, ::-1].copy(), np.ones_like(along)):
            together = np.trace(rows @ error @ columns @ error.T)
            alone = np.diag(rows) @ error**2 @ np.diag(columns)
            found = power.power(key).coherence(error)
            assert found == pytest.approx(together / alone, rel=0.5, abs=0.1)
        assert power.power(key).coherence(along) > 3


def test_rows_that_are_sampled_are_those_of_the_sketch():
    rng = np.random.default_rng(0)
    tall, wide = (rng.standard_normal(s).astype(np.float32) for s in ((4, 2), (2, 6)))
    power = Power(np.ones(4), np.ones(6), tall, wide)
    error = rng.standard_normal((4, 6)).astype(np.float32)
    index = np.array([1, 3])
    cut = Power(np.ones(2), np.ones(6), tall[index], wide)
    assert power.coherence(error[index], index) == pytest.approx(cut.coherence(error[index]))
    assert power.coherence(error[index], index) != pytest.approx(power.coherence(error))


def test_independent_errors_have_a_coherence_of_one():
    rng = np.random.default_rng(1)
    tall, wide = (rng.standard_normal(s).astype(np.float32) for s in ((64, 32), (32, 96)))
    power = Power(np.ones(64), np.ones(96), tall, wide)
    errors = rng.standard_normal((50, 64, 96)).astype(np.float32)
    assert np.mean([power.coherence(one) for one in errors]) == pytest.approx(1, abs=0.05)
    assert Power(np.ones(64), np.ones(96)).coherence(errors[0]) == 1
    nothing = np.zeros((64, 96), np.float32)
    assert power.coherence(nothing) == 1
