"""Replayed calls, with a recorder that records a call as CUDA does: by where its inputs lie."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_compiling import tiny_flux
from test_low_bit import HERE
from torch import nn

from diffquant.runtime import capture
from diffquant.runtime.compile_choice import Compiling
from diffquant.runtime.engines import EngineFiles, bundled
from diffquant.runtime.graph_choice import Graphs
from diffquant.runtime.layers import PackedWeight, QuantLinear
from diffquant.runtime.low_bit import assign, pending
from diffquant.runtime.request import PictureRequest

FLUX = Path(__file__).parents[2] / "examples" / "flux1-shapes"


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


@torch.no_grad()
def test_graphs_are_gone_with_the_context_and_no_garbage_is_collected_while_one_is_made(model):
    """One that dies while the next is captured would end that capture."""
    made, collecting = [], []

    class Watching:
        def record(self, call):
            collecting.append(gc.isenabled())
            found, again = call(), lambda: None  # as CUDA's: it knows nothing of the call
            made.append(weakref.ref(again))
            return found, again

    x = torch.randn(2, 4)
    gc.disable()
    try:
        with capture.captured(model, Watching()) as state:
            model(x, IDS)
            gc.enable()
            model(x, IDS)
            assert gc.isenabled()
            gc.disable()
            assert made[0]() is not None
        assert made[0]() is None
    finally:
        gc.enable()
    assert collecting == [False]
    assert state.captured == 1


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


@torch.no_grad()
def test_weights_that_left_make_every_shape_begin_anew(model):
    """Memory ran out before anything was captured: both halves of a guided step were seen."""
    x = torch.randn(2, 4)
    with capture.captured(model, Recorder()) as state:
        for ids in (IDS, IDS + 1):
            model(x, ids)
        model.packed.home = object()
        model(x, IDS)  # the first half brings the weights again
        model.packed.home = None
        model(x, IDS + 1)
        assert (state.captured, state.plain) == (0, 4)
        for ids in (IDS, IDS + 1):
            assert torch.equal(model(x, ids), model.layer(x) + ids.sum())
        assert (state.captured, state.plain) == (2, 4)


@torch.no_grad()
def test_fewer_calls_than_steps_are_too_few(model):
    """A picture to begin with: the last steps of twenty are walked."""
    x, recorder = torch.randn(2, 4), Recorder()
    with Graphs("auto", Parts(model), "cuda", 20, recorder=recorder) as graphs:
        graphs.begin(3)
        for _ in range(3):
            model(x, IDS)
        assert recorder.recorded == 0
    assert graphs.said == "no CUDA graph: 3 calls are too few"
    assert "forward" not in vars(model)
    with Graphs("on", Parts(model), "cuda", 20, recorder=recorder) as graphs:
        graphs.begin(3)
        for _ in range(3):
            model(x, IDS)
    assert graphs.said == "CUDA graph: 2 of 3 calls"


def test_blocks_are_compiled_before_they_are_captured():
    """Layers that measure themselves let blocks be compiled after a step: never in a capture."""
    model, call = tiny_flux()
    assign(model, "int8", {"int8": HERE["int8"]})
    parts, order = Parts(model), []

    class Telling(Recorder):
        def record(self, call):
            order.append("capture begins")
            found = super().record(call)
            order.append("capture ends")
            return found

    graphs = Graphs("on", parts, "cuda", 5, compiled=True, recorder=Telling())
    blocks = Compiling("on", parts, "cpu", order.append, backend="aot_eager", began=graphs.anew)
    with blocks, graphs, torch.no_grad():
        assert pending(model)
        found = []
        for done in range(1, 6):
            found.append(call())
            blocks.stepped(done, 5)
    assert order == ["compiling block 1 of 1", "capture begins", "capture ends"]
    assert all(torch.equal(one, found[0]) for one in found)
    assert graphs.said == "CUDA graph: 3 of 5 calls"


class Second(Recorder):
    """The second capture fails."""

    def record(self, call):
        self.fails = self.recorded == 1
        return super().record(call)


@torch.no_grad()
def test_what_was_replayed_is_said_though_a_later_capture_fails_or_weights_move(model):
    x = torch.randn(2, 4)
    with Graphs("auto", Parts(model), "cuda", 4, recorder=Second()) as graphs:
        for _ in range(4):
            model(x, IDS), model(x, IDS + 1)
    assert graphs.said.startswith("CUDA graph: 3 of 8 calls, then capturing failed (RuntimeError:")
    with Graphs("auto", Parts(model), "cuda", 4, recorder=Recorder()) as graphs:
        for _ in range(3):
            model(x, IDS)
        model.to(torch.float64)  # it overflowed, and one call follows
        model(x.double(), IDS)
    assert graphs.said == "CUDA graph: 2 of 4 calls"


@pytest.mark.parametrize(
    ("mode", "device", "fails", "calls", "warned"),
    [
        ("on", "cpu", False, 6, "--cuda-graphs on: no CUDA graph: the device is cpu"),
        ("on", "cuda", False, 1, "--cuda-graphs on: no CUDA graph: no call was made twice"),
        ("on", "cuda", True, 6, "--cuda-graphs on: no CUDA graph: capturing failed (RuntimeErr"),
        ("auto", "cuda", True, 6, "--cuda-graphs auto: no CUDA graph: capturing failed (Runtim"),
        ("auto", "cpu", False, 6, ""),
        ("auto", "cuda", False, 6, ""),
        ("on", "cuda", False, 6, ""),
        ("off", "cuda", False, 6, ""),
    ],
)
@torch.no_grad()
def test_what_was_asked_for_in_vain_and_what_failed_is_a_warning(
    model, mode, device, fails, calls, warned
):
    x = torch.randn(2, 4)
    with Graphs(mode, Parts(model), device, calls, recorder=Recorder(fails=fails)) as graphs:
        for _ in range(calls):
            model(x, IDS)
    assert graphs.warning.startswith(warned)
    assert bool(graphs.warning) == bool(warned)


def test_pictures_that_are_judged_are_drawn_from_replays(monkeypatch):
    """`verify` and `compare` on a card: each picture is a pass of its own, and `how` says it."""
    recorders = []

    def on_a_card(mode, parts, _device, steps):
        recorders.append(Recorder())
        return Graphs(mode, parts, "cuda", steps, recorder=recorders[-1])

    side = bundled.open_side(EngineFiles(FLUX))
    few, many = (PictureRequest("a red circle", steps=n, width=64, height=64) for n in (3, 6))
    wanted = side.draw(many)
    assert side.how == "read and run by diffquant"
    monkeypatch.setattr(bundled, "Graphs", on_a_card)
    there = replace(side, files=replace(side.files, device="cuda"))
    assert np.array_equal(there.draw(many), wanted)
    assert np.array_equal(there.draw(many), wanted)
    there.draw(few)
    assert [one.recorded for one in recorders] == [1, 1, 0]
    assert [one.replays for one in recorders] == [4, 4, 0]
    assert there.how == (
        "read and run by diffquant; CUDA graph: 5 of 6 calls; no CUDA graph: 3 steps are too few"
    )
