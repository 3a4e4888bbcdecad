"""Layers that multiply in 8 bits: which, how their weights change, what is measured and told."""

import contextlib
import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from packed_parts import random_parts
from test_compiling import tiny_flux, tiny_qwen

from diffquant.core.errors import UnknownFormat
from diffquant.quant.formats import FORMATS
from diffquant.runtime import few_rows, low_bit
from diffquant.runtime.compile_choice import Compiling
from diffquant.runtime.compiling import compiled
from diffquant.runtime.compute import ENGINES, Card, Engine, Refused, engine_for, engines_for
from diffquant.runtime.control import damaged
from diffquant.runtime.engines import EngineFiles, bundled
from diffquant.runtime.kernels import products
from diffquant.runtime.kernels.rows import KINDS, QuantizedRows, RowKind
from diffquant.runtime.layers import LowRank, PackedWeight, QuantLinear, Segment
from diffquant.runtime.low_bit import LowBitLayer, apply, assign
from diffquant.runtime.memory.budget import Asked
from diffquant.runtime.memory.planning import plan_run
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.packed_rows import STORED
from diffquant.runtime.request import PictureRequest

FLUX = Path(__file__).parents[2] / "examples" / "flux1-shapes"

HERE = {
    kind: Engine(kind, "reference", 0, False, (torch.float32, torch.bfloat16), "a test")
    for kind in ("fp8", "int8")
}
HOPPER, AMPERE = Card("cuda", 90), Card("cuda", 80)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Models of tests have fewer tokens than pay on a card."""
    monkeypatch.setattr(few_rows, "FEW", 3)


def relative(found, wanted):
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def layer_of(fmt, columns=512, rows=48, bias=True):
    """A layer of a format, numbers as of a trained weight."""
    layer = QuantLinear(columns, rows, bias=bias)
    if bias:
        layer.bias.data = torch.linspace(-1, 1, rows)
    parts = random_parts(fmt, (rows, columns))
    for key, part in parts.items():
        if part.dtype.itemsize == 1 and part.dtype.is_floating_point:
            parts[key] = part.float().nan_to_num(1, 1, 1).to(part.dtype)
    if "s_rel" in parts:
        parts["s_rel"] = parts["s_rel"].view(torch.uint8) & 0x77
    layer.bind(PackedWeight((Segment(fmt, (rows, columns), parts),)))
    return layer.requires_grad_(False)


def tokens(columns=512, count=16):
    return torch.randn(2, count, columns, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("fmt", STORED)
def test_a_weight_in_8_bits_is_multiplied_as_it_is_stored(fmt):
    kind = STORED[fmt].kind
    layer, x = layer_of(fmt), tokens()
    wanted, before = layer(x), layer.packed
    layer.product = product = LowBitLayer(kind, "", (torch.float32,))
    first, second = layer(x), layer(x)
    assert (product.state, product.requantized) == ("on", False)
    assert layer.packed is before
    assert torch.equal(first, second)
    assert first.shape == wanted.shape
    # what is left is the rounding of activations alone: half a step of their 8 bits
    assert 1e-4 < relative(second, wanted) < (0.03 if kind == "fp8" else 0.012)
    assert product.error == pytest.approx(relative(first, wanted), rel=1e-3)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("fmt", ["q4_k", "q8_0", "nf4", "bf16", "int8_bnb"])
def test_other_weights_are_quantized_once_and_replaced(fmt, kind):
    layer, x = layer_of(fmt), tokens()
    wanted = layer(x)
    layer.product = product = LowBitLayer(kind, "", (torch.float32,))
    first, replaced = layer(x), layer.packed
    second = layer(x)
    assert (product.state, product.requantized) == ("on", True)
    assert replaced.formats == (KINDS[kind].rowwise,)
    assert replaced.nbytes == 48 * (512 + 4)
    assert layer.packed is replaced
    assert torch.equal(first, second)
    assert relative(second, wanted) < (0.045 if kind == "fp8" else 0.02)


def test_segments_of_several_formats_are_multiplied_apart():
    layer = QuantLinear(512, 96)
    layer.bias.data = torch.cat((torch.zeros(48), torch.full((48,), 1e5)))
    parts = [layer_of(fmt).packed.segments[0] for fmt in ("int8_convrot", "int8_rowwise")]
    layer.bind(PackedWeight(tuple(parts)))
    layer.requires_grad_(False)
    wanted = layer(tokens())
    layer.product = LowBitLayer("int8", "", (torch.float32,))
    found = layer(tokens())
    assert layer.product.state == "on"
    for half in (slice(0, 48), slice(48, 96)):
        assert relative(found[..., half], wanted[..., half]) < 0.012


def test_adapters_stay_beside():
    layer, x = layer_of("int8_rowwise"), tokens()
    plain = layer(x)
    layer.adapters = [LowRank(torch.randn(4, 512), torch.randn(48, 4), 2.0)]
    delta = layer(x) - plain
    layer.product = LowBitLayer("int8", "", (torch.float32,))
    with_adapter = layer(x)
    assert layer.product.state == "on"
    layer.adapters = []
    assert torch.allclose(with_adapter - layer(x), delta, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("odd", [1e4, float("nan")])
def test_a_layer_that_is_off_by_more_than_the_bound_stays_exact(odd):
    """A few columns with most of a token's size leave the others without codes."""
    layer, x = layer_of("q8_0", bias=False), tokens()
    weight = torch.randn(48, 512)
    weight[:, 0] = 0
    layer.bind(PackedWeight.of(weight))
    x[..., 0] = odd
    wanted, before = layer(x), layer.packed
    layer.product = product = LowBitLayer("int8", "", (torch.float32,))
    found = layer(x)
    assert product.state == "off"
    assert "off by more than 0.08" in product.reason
    assert layer.packed is before
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    assert torch.equal(layer(x).nan_to_num(7), wanted.nan_to_num(7))


def test_few_rows_and_other_dtypes_are_exact():
    layer, x = layer_of("int8_rowwise"), tokens()
    wanted, few = layer(x), layer(x[:1, :3])
    layer.product = LowBitLayer("int8", "", (torch.bfloat16,))
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer(x[:1, :3]), few)
    assert layer.product.state == "pending"


class Elsewhere:
    """Brings a weight anew for every call, as a stream does."""

    device = torch.device("cpu")

    def __init__(self, weight):
        self.kept = weight

    def weight(self, layer):
        return self.kept.copy()


def test_a_streamed_weight_is_used_as_stored_or_stays_exact():
    layer, x = layer_of("int8_rowwise"), tokens()
    layer.home = Elsewhere(layer.packed)
    layer.product = LowBitLayer("int8", "", (torch.float32,))
    layer(x)
    assert layer.product.state == "on"
    other = layer_of("q4_k")
    wanted, before = other(x), other.packed
    other.home = Elsewhere(other.packed)
    other.product = LowBitLayer("int8", "", (torch.float32,))
    assert torch.equal(other(x), wanted)
    assert other.product.state == "off"
    assert "streamed" in other.product.reason
    assert other.packed is before


def test_a_weight_that_left_and_came_again_is_quantized_again():
    layer, x = layer_of("q4_k"), tokens()
    before = layer.packed
    layer.product = LowBitLayer("fp8", "", (torch.float32,))
    first = layer(x)
    layer.packed = before
    heard = []
    layer.on_replace = lambda *what: heard.append(what)
    assert torch.equal(layer(x), first)
    assert heard == [(layer, layer.packed)]
    layer.packed, layer.home = before, Elsewhere(before)
    assert torch.equal(layer(x), QuantLinear.forward(_plain(layer), x))
    assert layer.product.state == "off"


def _plain(layer):
    other = QuantLinear(512, 48)
    other.bias = layer.bias
    other.bind(layer.home.kept)
    return other


@pytest.mark.parametrize("make", [tiny_flux, tiny_qwen])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_blocks_multiply_in_8_bits_and_the_rest_stays(make, kind):
    model, call = make()
    wanted = call()
    found = assign(model, kind, {kind: HERE[kind]})
    first = call()
    states = {name: one.state for name, one in found.layers.items()}
    inside = [name for name in states if "blocks." in name and "mod" not in name]
    assert {name for name, state in states.items() if state == "on"} == set(inside)
    assert any("modulation" in text for text in found.said)
    assert 0 < relative(first, wanted) < 0.05
    assert torch.equal(call(), first)


def test_compiled_blocks_are_one_graph_each_after_the_first_step():
    model, call = tiny_flux()
    found = assign(model, "int8", {"int8": HERE["int8"]})
    parts = dataclasses.make_dataclass("Parts", ["denoiser", "architecture"])(model, "flux1")
    with Compiling("on", parts, "cpu", backend="aot_eager") as compiling:
        assert low_bit.pending(model)
        first = call()
        compiling.stepped(1, 3)
        assert not low_bit.pending(model)
        second = call()
        compiling.stepped(2, 3)
    assert "measured layers in 8 bits" in compiling.said
    assert torch.equal(first, second)
    assert found.layers["single_blocks.0.linear1"].state == "on"
    with compiled(model, backend="aot_eager") as state:
        assert torch.equal(call(), first)
    assert state.kinds == 1


def test_one_step_is_not_compiled_and_that_is_said():
    model, call = tiny_flux()
    assign(model, "int8", {"int8": HERE["int8"]})
    parts = dataclasses.make_dataclass("Parts", ["denoiser", "architecture"])(model, "flux1")
    with Compiling("on", parts, "cpu", backend="aot_eager") as compiling:
        call()
        compiling.stepped(1, 1)
    assert compiling.said == "not compiled: there was no second step"


def test_a_damaged_block_shows_through_weights_of_8_bits():
    model, call = tiny_flux()
    assign(model, "int8", {"int8": HERE["int8"]})
    first = call()
    with damaged(model, rows=True):
        assert relative(call(), first) > 0.01
    assert torch.equal(call(), first)


def test_plain_layers_of_a_packed_file_stay_and_plain_files_are_quantized():
    model, _ = tiny_flux()
    kept = model.single_blocks[0].linear2
    kept.bind(PackedWeight.of(torch.randn(kept.logical_shape)))
    found = assign(model, "fp8", {"fp8": HERE["fp8"]})
    assert "high precision" in found.layers["single_blocks.0.linear2"].reason
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.bind(PackedWeight.of(torch.randn(layer.logical_shape)))
    found = assign(model, "fp8", {"fp8": HERE["fp8"]})
    assert found.layers["single_blocks.0.linear2"].state == "pending"


def test_auto_takes_the_kind_that_is_stored():
    model, _ = tiny_flux()
    stored = model.single_blocks[0].linear2
    parts = random_parts("fp8_e4m3_scaled", stored.logical_shape)
    stored.bind(PackedWeight((Segment("fp8_e4m3_scaled", stored.logical_shape, parts),)))
    found = assign(model, "auto", HERE)
    assert {name for name, one in found.layers.items() if one.kind} == {"single_blocks.0.linear2"}
    assert found.layers["single_blocks.0.linear2"].kind == "fp8"
    assert found.nbytes == 0


def test_bytes_that_weights_will_take_more_are_known_beforehand():
    model, _ = tiny_flux()
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and layer.logical_shape[1] % 64 == 0:
            shape = layer.logical_shape
            parts = random_parts("nf4", shape)
            layer.bind(PackedWeight((Segment("nf4", shape, parts),)))
    linear = [one for one in model.modules() if isinstance(one, QuantLinear)]
    found = assign(model, "fp8", {"fp8": HERE["fp8"]})
    before = sum(layer.outline().nbytes for layer in linear)
    for layer in linear:
        if layer.product.kind:
            layer(torch.randn(8, layer.logical_shape[1]))
    assert sum(layer.outline().nbytes for layer in linear) - before == found.nbytes > 0


def test_tables_choose_by_capability():
    assert engine_for("fp8", HOPPER).name == "torch._scaled_mm"
    assert engine_for("int8", AMPERE).name == "triton"
    assert engine_for("int8", Card("cuda", 80, "no compiler")).name == "torch._int_mm"
    refused = engine_for("fp8", AMPERE)
    assert isinstance(refused, Refused)
    assert "8.9 (Ada, Hopper) or later, this card has 8.0" in refused.reason
    assert "gain nothing on cpu" in engine_for("int8", Card("cpu")).reason
    assert list(engines_for("auto", AMPERE)[0]) == ["int8"]
    assert engines_for("exact", HOPPER) == ({}, ())
    with pytest.raises(UnknownFormat, match="fp4"):
        engine_for("fp4", HOPPER)
    with pytest.raises(UnknownFormat, match="fp4"):
        engines_for("fp4", HOPPER)
    assert {one.kind for one in ENGINES} == {"fp8", "int8"}


def test_on_a_cpu_nothing_changes_and_that_is_said():
    model, call = tiny_flux()
    wanted = call()
    found = apply(model, "int8", Card("cpu"))
    assert found.warnings == (
        "--compute int8: computed exactly, products in int8 gain nothing on cpu: they are of CUDA "
        "cards",
    )
    assert torch.equal(call(), wanted)
    assert apply(model, "auto", Card("cpu")).warnings == ()


def test_stored_formats_exist():
    assert STORED.keys() <= FORMATS.keys()


def test_placed_weights_that_were_quantized_again_go_and_come():
    """Nothing of them stays when a model leaves the device; what comes again gives the same."""
    with contextlib.ExitStack() as files:
        opened = open_pipeline(FLUX, files=files, dtype=torch.float32, device="cpu")
        parts = opened.pipeline.parts
        found = assign(parts.denoiser, "int8", {"int8": HERE["int8"]})
        request = PictureRequest("a large red circle", steps=1, width=64, height=64)
        first = opened.pipeline.denoise(request).latents
        name, chosen = next((n, one) for n, one in found.layers.items() if one.kind)
        layer = parts.denoiser.get_submodule(name)
        assert (chosen.state, layer.packed.formats) == ("on", ("int8_rowwise",))
        alive = weakref.ref(layer.packed.segments[0].parts["weight"])
        opened.placement.release()
        gc.collect()
        assert alive() is None
        assert torch.equal(opened.pipeline.denoise(request).latents, first)
        assert layer.packed.formats == ("int8_rowwise",)


def test_a_plan_counts_bytes_that_weights_take_more():
    with contextlib.ExitStack() as files:
        opened = open_pipeline(FLUX, files=files, dtype=torch.float32, device="cpu")
        request = PictureRequest("x", steps=1, width=64, height=64)
        asked = Asked(ram=8 << 30)
        plain, more = (plan_run(opened, request, asked, extra=n) for n in (0, 5 << 20))
    assert more.peak_nbytes - plain.peak_nbytes == 5 << 20


def test_a_side_that_is_judged_runs_as_it_was_asked_to(monkeypatch):
    """As on a card: the denoiser in bfloat16, its blocks in 8 bits, and `how` says so."""
    monkeypatch.setattr(bundled, "card_of", lambda _device: HOPPER)
    request = PictureRequest("a large red circle", steps=1, width=64, height=64)
    side = bundled.open_side(EngineFiles(FLUX, compute="int8"))
    denoiser = side.opened.pipeline.parts.denoiser
    assert param_dtype(denoiser) == torch.bfloat16
    assert "10 layers int8, not called yet" in side.how
    made = side.draw(request)
    assert "10 layers int8 (triton: scales and bias in the product itself), output" in side.how
    exact = bundled.open_side(EngineFiles(FLUX))
    assert exact.how == "read and run by diffquant"
    assert 0 < abs(made - exact.draw(request)).mean() < 0.02


def test_rows_come_quantized_only_once_a_layer_is_on():
    layer, x = layer_of("q8_0"), torch.randn(1, 40, 512)
    assert layer.takes(x) is None
    layer.product = LowBitLayer("int8", "", (torch.float32,))
    assert layer.takes(x) is None
    layer(x)
    kind = layer.takes(x)
    assert kind == RowKind("int8", 0)
    assert layer.takes(x[:, :3]) is None  # few rows
    assert layer.takes(x.double()) is None
    q, scale = products.quantize_rows(x[0], "int8")
    assert torch.equal(layer(QuantizedRows(q, scale, kind, x.shape, x.dtype)), layer(x))
    layer.adapters = [LowRank(torch.zeros(1, 512), torch.zeros(48, 1), 1.0)]
    assert layer.takes(x) is None  # they are given what is not quantized
