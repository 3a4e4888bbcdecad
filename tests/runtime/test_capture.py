"""Replayed calls, with a recorder that records a call as CUDA does: by where its inputs lie."""

import pytest
import torch
from torch import nn

from diffquant.runtime import capture
from diffquant.runtime.layers import QuantLinear


class Recorder:
    """Runs the recorded call again, on the same tensors, into the same result."""

    def __init__(self, fails=False):
        self.fails, self.recorded, self.replays = fails, 0, 0

    def record(self, call):
        if self.fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.recorded += 1
        found = call()

        def again():
            self.replays += 1
            found.copy_(call())

        return found, again


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.packed = QuantLinear(4, 3)  # not called: what counts is where its weight is

    def forward(self, x, ids, scale=1.0):
        return self.layer(x) * scale + ids.sum()


@pytest.fixture
def model():
    return Model()


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch):
    """Float tensors count as a device's, integers as the host's."""
    monkeypatch.setattr(capture, "_is_constant", lambda leaf: not leaf.is_floating_point())


IDS = torch.arange(5)


@torch.no_grad()
def test_calls_of_one_shape_are_recorded_once_and_replayed(model):
    recorder = Recorder()
    xs = [torch.randn(2, 4) for _ in range(4)]
    wanted = [model(x, IDS, scale=2.0) for x in xs]
    with capture.captured(model, recorder) as state:
        found = [model(x, IDS, scale=2.0) for x in xs]
    for a, b in zip(found, wanted, strict=True):  # no replay changed an earlier result
        assert torch.equal(a, b)
    assert (state.plain, state.graphs, recorder.recorded, recorder.replays) == (1, 1, 1, 2)
    assert "forward" not in vars(model)


@torch.no_grad()
def test_other_shapes_values_and_constants_are_other_graphs(model):
    x = torch.randn(2, 4)
    with capture.captured(model, Recorder(), most=3) as state:
        for _ in range(3):
            for given in ((x, IDS), (x[:1], IDS), (x, IDS + 1)):
                assert torch.equal(model(*given), model.layer(given[0]) + given[1].sum())
        assert state.graphs == 3
        for _ in range(3):  # a fourth kind is one too many
            assert torch.equal(model(x, IDS, scale=3.0), model.layer(x) * 3 + IDS.sum())
    assert (state.graphs, state.plain) == (3, 6)


@torch.no_grad()
def test_what_cannot_be_captured_runs_as_it_is_and_says_why(model):
    x = torch.randn(2, 4)
    with capture.captured(model, Recorder(fails=True)) as state:
        for _ in range(3):
            assert torch.equal(model(x, IDS), model.layer(x) + IDS.sum())
    assert state.graphs == 0
    assert state.plain == 3
    assert state.failed == "RuntimeError: operation not permitted when stream is capturing"


@torch.no_grad()
def test_streamed_weights_are_not_captured(model):
    x = torch.randn(2, 4)
    with capture.captured(model, Recorder()) as state:
        model.packed.home = object()
        for _ in range(3):
            assert torch.equal(model(x, IDS), model.layer(x) + IDS.sum())
        assert (state.graphs, state.plain) == (0, 3)
        model.packed.home = None
        model(x, IDS)
    assert (state.graphs, state.plain) == (1, 3)
