"""Replayed calls, with a recorder that records a call as CUDA does: by where its inputs lie."""

import pytest
import torch
from torch import nn

from diffquant.runtime import capture
from diffquant.runtime.graph_choice import Graphs
from diffquant.runtime.layers import PackedWeight, QuantLinear


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


@torch.no_grad()
def test_weights_that_lie_elsewhere_are_captured_anew(model):
    x = torch.randn(2, 4)
    model.packed.bind(PackedWeight.of(torch.randn(3, 4)))
    with capture.captured(model, Recorder()) as state:
        for _ in range(3):
            model(x, IDS)
        assert (state.graphs, state.replayed) == (1, 1)
        model.packed.replace(PackedWeight.of(torch.randn(3, 4)))
        model(x, IDS)
        assert (state.graphs, state.plain) == (0, 2)
        for _ in range(2):
            model(x, IDS)
        assert (state.graphs, state.replayed) == (1, 2)
        model.to(torch.float64)
        assert model(x.double(), IDS).dtype == torch.float64
        assert state.graphs == 0


class Parts:
    architecture = "flux1"

    def __init__(self, denoiser):
        self.denoiser = denoiser


@pytest.mark.parametrize(
    ("mode", "device", "steps", "said"),
    [
        ("off", "cuda", 20, "no CUDA graph: asked for"),
        ("auto", "cpu", 20, "no CUDA graph: the device is cpu"),
        ("on", "mps", 20, "no CUDA graph: the device is mps"),
        ("auto", "cuda", 3, "no CUDA graph: 3 steps are too few"),
        ("auto", "cuda", 4, "CUDA graph: 3 of 4 calls"),
        ("on", "cuda:1", 2, "CUDA graph: 1 of 2 calls"),
        ("on", "cuda", 1, "no CUDA graph: no call was made twice"),
    ],
)
@torch.no_grad()
def test_steps_are_captured_where_that_can_be_and_it_is_said(model, mode, device, steps, said):
    x = torch.randn(2, 4)
    with Graphs(mode, Parts(model), device, steps, recorder=Recorder()) as graphs:
        for _ in range(steps):
            assert torch.equal(model(x, IDS), model.layer(x) + IDS.sum())
    assert graphs.said == said
    assert "forward" not in vars(model)


def test_compiled_blocks_are_not_captured_unless_asked_for(model):
    compiled = {"compiled": True, "recorder": Recorder()}
    auto = Graphs("auto", Parts(model), "cuda", 9, **compiled)
    assert (auto.possible, auto.said) == (False, "no CUDA graph: blocks are compiled")
    assert Graphs("on", Parts(model), "cuda", 9, **compiled).possible


@torch.no_grad()
def test_why_nothing_was_captured_is_said(model):
    x = torch.randn(2, 4)
    with Graphs("auto", Parts(model), "cuda", 9, recorder=Recorder(fails=True)) as graphs:
        for _ in range(9):
            model(x, IDS)
    assert graphs.said.startswith("no CUDA graph: capturing failed (RuntimeError: operation not")
    model.packed.home = object()
    with Graphs("auto", Parts(model), "cuda", 9, recorder=Recorder()) as graphs:
        for _ in range(9):
            model(x, IDS)
    assert graphs.said == "no CUDA graph: weights are streamed"
