"""Weights decoded ahead: the same numbers, every wait that a second stream needs, little memory."""

import contextlib
import gc
import weakref

import pytest
import torch
from test_capture import Recorder
from torch import nn

from diffquant.runtime import ahead
from diffquant.runtime.ahead import MOST, led, watched
from diffquant.runtime.capture import captured
from diffquant.runtime.layers import PackedLayer, PackedWeight, QuantLinear

MAIN, ASIDE = "main", "aside"


class Lanes:
    """Two queues, with what each knows of the other: a clock of both, joined by every wait."""

    def __init__(self):
        self.lane = MAIN
        self.clocks = {MAIN: {MAIN: 0, ASIDE: 0}, ASIDE: {MAIN: 0, ASIDE: 0}}

    @contextlib.contextmanager
    def aside(self):
        before, self.lane = self.lane, ASIDE
        yield
        self.lane = before

    def launch(self):
        """Something runs on the queue that is launched to: (queue, its number there, its past)."""
        clock = self.clocks[self.lane]
        clock[self.lane] += 1
        return self.lane, clock[self.lane], dict(clock)

    def mark(self):
        return dict(self.clocks[self.lane])

    def wait(self, mark):
        clock = self.clocks[self.lane]
        for lane in clock:
            clock[lane] = max(clock[lane], mark[lane])


def before(one, other):
    lane, number, _ = one
    return other[2][lane] >= number


class Model(nn.Module):
    """Packed layers, one of them stored as it is multiplied, one used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(QuantLinear(8, 8) for _ in range(7))
        for i, layer in enumerate(self.layers):
            dtype = torch.float32 if i == 3 else torch.float16  # float16 is decoded to float32
            layer.bind(PackedWeight.of(torch.randn(8, 8).to(dtype)))
            nn.init.normal_(layer.bias)
        self.order = (0, 1, 2, 3, 4, 1, 5, 6)

    def forward(self, x):
        for i in self.order:
            x = torch.tanh(self.layers[i](x))
        return x


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def log(monkeypatch):
    """What is launched where: decodes and products; weights that are alive."""
    lanes, events, alive = Lanes(), [], []
    most = [0]
    decoded, linear = PackedLayer.decoded, torch.nn.functional.linear

    def decode(layer, dtype):
        found = decoded(layer, dtype).clone()
        events.append(("decode", layer, lanes.launch()))
        alive.append(weakref.ref(found))
        most[0] = max(most[0], sum(one() is not None for one in alive))
        return found

    def multiply(x, weight, bias=None):
        events.append(("multiply", None, lanes.launch()))
        return linear(x, weight, bias)

    monkeypatch.setattr(PackedLayer, "decoded", decode)
    monkeypatch.setattr(torch.nn.functional, "linear", multiply)
    return lanes, events, most


def run(model, x, lanes):
    with watched(model) as asked:
        wanted = model(x)
    with led(model, tuple(asked), lanes) as state:
        found = model(x)
    return wanted, found, state, asked


@torch.no_grad()
def test_numbers_are_the_same_and_every_decoded_weight_but_stored_ones_comes_ahead(model, log):
    lanes, events, _ = log
    wanted, found, state, asked = run(model, torch.randn(3, 8), lanes)
    assert torch.equal(found, wanted)
    assert [layer for layer, _ in asked] == [model.layers[i] for i in model.order if i != 3]
    assert state.ahead == 7
    led_events = events[len(events) // 2 :]
    asides = [layer for what, layer, at in led_events if what == "decode" and at[0] == ASIDE]
    assert asides == [layer for layer, _ in asked]
    assert all(layer.decode is None for layer in model.layers)


@torch.no_grad()
def test_products_wait_for_their_weight_and_memory_is_written_after_its_last_reader(model, log):
    lanes, events, most = log
    with watched(model) as asked:
        model(torch.randn(3, 8))
    events.clear()
    most[0] = 0
    gc.collect()
    with led(model, tuple(asked), lanes):
        model(torch.randn(3, 8))
    decodes = [at for what, _, at in events if what == "decode" and at[0] == ASIDE]
    products = [at for what, _, at in events if what == "multiply"]
    readers = [at for at, i in zip(products, model.order, strict=True) if i != 3]
    assert all(before(one, two) for one, two in zip(decodes, readers, strict=True))
    # A weight's memory may be that of the one MOST + 1 before it, whose product must be over.
    late = list(zip(readers, decodes[MOST + 1 :], strict=False))
    assert late
    assert all(before(one, two) for one, two in late)
    assert most[0] <= MOST + 2  # and the stored one, which is a copy here
    # It runs ahead: a decode need not wait for the product just before its own.
    free = [not before(readers[i - 1], decodes[i]) for i in range(1, len(decodes))]
    assert all(free)


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 2, 1, 4), (6, 0, 1), (0, 1), (0, 1, 2, 3, 4, 1, 5, 6, 0, 2)])
def test_a_call_in_another_order_decodes_in_place(model, log, order):
    lanes, events, _ = log
    with watched(model) as asked:
        model(torch.randn(3, 8))
    model.order = order
    x = torch.randn(3, 8)
    wanted = model(x)
    earlier = lanes.launch()
    events.clear()
    with led(model, tuple(asked), lanes) as state:
        found = model(x)
    assert torch.equal(found, wanted)
    assert state.ahead <= 8
    # Also what nobody asked for began after what was launched before the call, and has ended.
    after, asides = lanes.launch(), [at for _, _, at in events if at[0] == ASIDE]
    assert asides
    assert all(before(earlier, one) for one in asides)
    assert all(before(one, after) for one in asides)


@torch.no_grad()
def test_a_weight_that_somebody_keeps_is_never_written_to(model, log):
    lanes, events, _ = log
    layers, kept = model.layers, []
    with watched(model) as asked:
        model(torch.randn(3, 8))
    events.clear()
    with led(model, tuple(asked), lanes) as state:
        kept.append(layers[0].weight(torch.float32))
        for i in (1, 2, 4):
            layers[i](torch.randn(3, 8))
    assert state.ahead == 1 + MOST  # what was launched by then; the last one in place
    assert torch.equal(kept[0], layers[0].decoded(torch.float32))
    asides = [layer for what, layer, at in events if what == "decode" and at[0] == ASIDE]
    assert asides == [layers[0], layers[1], layers[2]]


@torch.no_grad()
def test_an_error_in_a_call_leaves_layers_as_they_were(model):
    lanes = Lanes()
    with pytest.raises(ZeroDivisionError), led(model, ((model.layers[0], torch.float32),), lanes):
        raise ZeroDivisionError
    assert all(layer.decode is None for layer in model.layers)


@torch.no_grad()
def test_a_captured_call_is_led_by_the_order_of_the_one_before(model, log):
    lanes, events, _ = log
    x = torch.randn(3, 8)
    wanted = model(x)
    with captured(model, Recorder(), lanes=lanes) as state:
        found = [model(x) for _ in range(4)]
        assert state.ahead == 7 * 3  # this recorder runs the call again for every replay
        events.clear()
        state.anew()
        assert state.ahead == 0
        model(x)
        assert {at[0] for what, _, at in events if what == "decode"} == {MAIN}
    assert all(torch.equal(one, wanted) for one in found)


def test_layers_that_multiply_in_8_bits_from_a_call_on_are_not_asked(monkeypatch, model):
    monkeypatch.setattr(ahead, "_multiplies_packed", lambda layer: layer is model.layers[1])
    with torch.no_grad(), watched(model) as asked:
        model(torch.randn(3, 8))
    assert [layer for layer, _ in asked] == [model.layers[i] for i in (0, 2, 4, 5, 6)]
