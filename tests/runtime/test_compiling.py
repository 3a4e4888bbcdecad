"""Compiled blocks over packed weights, without a C++ compiler: graphs are made and run by torch.

Tolerances are zero. The backends `eager` and `aot_eager` run the very operators of the graph, and
a graph that reorders none of them gives the same bits.
"""

import pytest
import torch
from packed_parts import random_parts
from torch._dynamo.testing import CompileCounterWithBackend

from diffquant.core.errors import UsageError
from diffquant.quant.formats import FORMATS
from diffquant.runtime import compiling
from diffquant.runtime.compile_choice import MEASURED, Choice, Compiling, Measured, choose
from diffquant.runtime.compiling import compiled, kinds_of, regions
from diffquant.runtime.control import damaged
from diffquant.runtime.layers import LowRank, PackedLayer, PackedWeight, Segment
from diffquant.runtime.models import flux, qwen_image, unet
from diffquant.runtime.models.unet_config import AttentionSpec, ResSpec, UNetConfig


def filled(model, fmt="q8_0", seed=0):
    """Give a model random weights, packed where rows are long enough for blocks."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(1.0, 0.1, generator=generator)
    for layer in model.modules():
        if not isinstance(layer, PackedLayer):
            continue
        shape = layer.logical_shape
        if len(shape) == 2 and shape[1] % FORMATS[fmt].block_size == 0:
            parts = random_parts(fmt, shape)
            # 16-bit scales of order one would make activations overflow
            blocks = parts["weight"].view(-1, FORMATS[fmt].nbytes((1, FORMATS[fmt].block_size)))
            small = torch.full((len(blocks), 1), 2e-4, dtype=torch.float16)
            blocks[:, :2] = small.view(torch.uint8)
            layer.bind(PackedWeight((Segment(fmt, shape, parts),)))
        else:
            layer.bind(PackedWeight.of(torch.randn(shape, generator=generator) * 0.05))
    return model.requires_grad_(False).eval()


def tiny_flux(double=0):
    config = flux.FluxConfig(
        in_channels=16, out_channels=16, width=64, hidden=128, single_hidden=128, head_dim=16,
        context=24, vector=20, time=256, double_depth=double, single_depth=3, guidance=True,
        axes=(4, 6, 6), theta=1e4, eps=1e-6,
    )  # fmt: skip
    model = filled(flux.Flux(config))
    img, txt, pooled = torch.randn(1, 15, 16), torch.randn(1, 5, 24), torch.randn(1, 20)
    places = flux.image_ids(6, 10), torch.zeros(5, 3)
    one = torch.ones(1)
    return model, lambda: model(img, one * 0.5, txt, pooled, *places, one * 3.5)


def tiny_qwen():
    config = qwen_image.QwenImageConfig(
        in_channels=16, out_channels=16, width=64, hidden=128, text_hidden=128, head_dim=16,
        context=32, time=256, depth=3, axes=(4, 6, 6), theta=1e4, eps=1e-6, still=False,
        condition=False, layered=False,
    )  # fmt: skip
    model = filled(qwen_image.QwenImage(config))
    img, txt = torch.randn(1, 15, 16), torch.randn(1, 5, 32)
    return model, lambda: model(img, torch.tensor([0.5]), txt, [(1, 3, 5)])


def tiny_unet():
    res = ResSpec(before=32, after=32)
    attention = AttentionSpec(
        channels=32, depth=2, heads=2, context=32, hidden=64, convolution=False
    )
    config = UNetConfig(
        in_channels=4, out_channels=4, base=32, embedding=64, label=None, groups=8, eps=1e-5,
        inputs=((), (res, attention)), middle=(res,),
        outputs=((ResSpec(before=64, after=32),), (ResSpec(before=64, after=32),)),
        guidance=None,
    )  # fmt: skip
    model = filled(unet.UNet(config))
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    return model, lambda: model(x, torch.tensor([500.0, 500.0]), context)


MODELS = {"flux": lambda: tiny_flux(double=2), "qwen_image": tiny_qwen, "unet": tiny_unet}


@pytest.fixture(autouse=True)
def no_gradients_and_no_graphs_left():
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "blocks", "kinds"), [
    ("flux", 5, 2), ("qwen_image", 3, 1), ("unet", 6, 3),
])  # fmt: skip
def test_blocks_of_one_kind_share_a_graph_that_equals_plain_code(name, blocks, kinds):
    model, call = MODELS[name]()
    wanted = call()
    assert wanted.isfinite().all()
    counter = CompileCounterWithBackend("eager")
    told = []
    with compiled(
        model, least=1, backend=counter, on_compile=lambda *one: told.append(one)
    ) as state:
        assert torch.equal(call(), wanted)
        assert torch.equal(call(), wanted)
        assert (state.blocks, state.kinds, counter.frame_count) == (blocks, kinds, kinds)
    assert told == [(number, kinds) for number in range(1, kinds + 1)]
    assert not any("forward" in block.__dict__ for block in regions(model))
    assert torch.equal(call(), wanted)
    assert counter.frame_count == kinds


def test_packed_bytes_are_inputs_of_the_graph_and_decoded_inside_of_it():
    model, call = tiny_flux()
    counter = CompileCounterWithBackend("eager")
    with compiled(model, backend=counter):
        call()
    for graph in counter.graphs:
        nodes = graph.graph.nodes
        assert not [node for node in nodes if node.op == "get_attr"]  # a constant would be one
        inputs = [node.meta["example_value"] for node in nodes if node.op == "placeholder"]
        packed = [one for one in inputs if one.dtype == torch.uint8]
        decoded = [node for node in nodes if "dequantize" in str(node.target)]
        assert len(decoded) == len(packed) == 3


def test_loras_are_part_of_the_graph_and_alike_ones_share_it():
    model, call = tiny_flux()
    plain = call()
    for block in model.single_blocks:
        lora = LowRank(torch.randn(2, 64) * 0.1, torch.randn(64, 2) * 0.1, 0.5, rows=(64, 128))
        block.linear1.adapters.append(lora)
    wanted = call()
    assert not torch.allclose(plain, wanted)
    counter = CompileCounterWithBackend("aot_eager")  # writes in place, which AOT has to see
    with compiled(model, backend=counter):
        assert torch.equal(call(), wanted)
    assert counter.frame_count == len(kinds_of(model)) == 1
    model.single_blocks[0].linear1.adapters.clear()
    assert [len(one) for one in kinds_of(model, least=1).values()] == [1, 2]
    assert not kinds_of(model)


def test_damage_needs_no_new_graph_and_float32_needs_one_more_of_each():
    model, call = tiny_flux()
    model.to(torch.bfloat16)
    lower = call()
    counter = CompileCounterWithBackend("eager")
    with compiled(model, backend=counter):
        assert torch.equal(call(), lower)
        with damaged(model, rows=True):
            damage = call()
        assert counter.frame_count == 1
        assert not torch.allclose(damage, lower)
        model.to(torch.float32)
        found = call()
        assert counter.frame_count == 2
    assert found.dtype == torch.float32
    assert torch.equal(found, call())


class Elsewhere:
    """A home that fetches in plain code what it keeps."""

    device = torch.device("cpu")

    def __init__(self):
        self.kept = {}

    def take(self, layer):
        self.kept[layer], layer.home = layer.packed, self

    def weight(self, layer):
        return self.kept[layer]


def test_blocks_whose_weights_are_streamed_run_as_they_are_and_it_is_said():
    model, call = tiny_flux()
    wanted, home = call(), Elsewhere()
    for layer in model.single_blocks[1].modules():
        if isinstance(layer, PackedLayer):
            home.take(layer)
    counter = CompileCounterWithBackend("eager")
    parts = Parts(model)
    with Compiling("on", parts, "cpu", backend=counter) as compiling:
        assert torch.equal(call(), wanted)
    assert compiling.said == (
        "compiled: asked for; 1 of 3 blocks ran as they are, since their weights are streamed"
    )
    assert counter.frame_count == 1
    with Compiling("on", parts, "cpu", backend="eager") as compiling:
        assert torch.equal(call(), wanted)
        for layer in home.kept:  # the weights have come
            layer.home = None
        assert torch.equal(call(), wanted)
    assert compiling.said == "compiled: asked for"


class Parts:
    """What Compiling asks of a pipeline's parts."""

    def __init__(self, denoiser, architecture="flux1"):
        self.denoiser, self.architecture = denoiser, architecture


def broken(_graph, _inputs):
    raise RuntimeError("no C compiler")


def test_a_failing_compiler_ends_the_run_only_where_it_was_asked_for(monkeypatch, caplog):
    model, call = tiny_flux()
    wanted = call()
    with (
        pytest.raises(UsageError, match="no C compiler"),
        Compiling("on", Parts(model), "cpu", backend=broken),
    ):
        call()
    assert torch.equal(call(), wanted)
    monkeypatch.setattr(
        "diffquant.runtime.compile_choice.choose", lambda *_, **__: Choice(True, "")
    )
    with Compiling("auto", Parts(model), "cpu", backend=broken) as compiling:
        compiling.stepped(1, 9)
        compiling.stepped(2, 9)
        assert torch.equal(call(), wanted)
    assert compiling.said.startswith("not compiled: the compiler failed (BackendCompilerFailed")
    assert "no C compiler" in caplog.text


@pytest.fixture
def repaid(monkeypatch):
    """A card on which compiling saves a third of a step."""
    monkeypatch.setitem(MEASURED, "flux1", Measured(saved=0.32, kind_s=3.3))


@pytest.mark.parametrize(("architecture", "device", "step_s", "left", "on", "why"), [
    ("flux1", "cpu", 100.0, 50, False, "not for cpu"),
    ("flux1", "mps", 100.0, 50, False, "not for mps"),
    ("sd2", "cuda", 100.0, 50, False, "not measured for sd2"),
    ("flux1", "cuda", 0.2, 18, False, "the 18 left would save about 1.2 s"),
    ("flux1", "cuda", 6.0, 18, True, "a step took 6 s"),
    ("flux1", "cuda", 6.0, 3, False, "the 3 left"),
])  # fmt: skip
def test_auto_compiles_where_the_steps_left_repay_it(
    architecture, device, step_s, left, on, why, repaid
):
    choice = choose(architecture, device, kinds=2, step_s=step_s, left=left)
    assert choice.compile == on
    assert why in choice.why


def test_what_runs_instead_is_not_compiled_too(repaid):
    model, call = tiny_flux()
    counter = CompileCounterWithBackend("eager")
    with Compiling("auto", Parts(model), "cuda", backend=counter, instead="graphs") as compiling:
        for done in range(1, 5):
            call()
            compiling.stepped(done, 1000)
    assert compiling.said == "not compiled: graphs"
    assert counter.frame_count == 0


def test_what_saves_nothing_is_not_compiled():
    choice = choose("flux1", "cuda", kinds=2, step_s=100.0, left=50)
    assert choice == Choice(False, "not compiled: measured for flux1, it saves nothing")


def test_auto_times_the_second_step_and_decides_once(monkeypatch, repaid):
    model, call = tiny_flux()
    clock = iter([10.0, 60.0, 61.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    counter = CompileCounterWithBackend("eager")
    with Compiling("auto", Parts(model), "cuda", backend=counter) as compiling:
        call()
        compiling.stepped(1, 20)  # took 10 s: weights came
        call()
        assert "too few steps" in compiling.said
        compiling.stepped(2, 20)
        assert counter.frame_count == 0
        call()
        compiling.stepped(3, 20)
    monkeypatch.undo()
    assert counter.frame_count == 1
    saves = 0.32 * 50 * 18
    assert f"a step took 50 s, the 18 left would save about {saves:.2g} s" in compiling.said


def test_kinds_that_serve_few_blocks_are_left():
    model, call = tiny_flux(double=2)
    wanted, counter = call(), CompileCounterWithBackend("eager")
    with compiled(model, backend=counter) as state:
        assert torch.equal(call(), wanted)
    assert (state.blocks, state.kinds, counter.frame_count) == (3, 1, 1)


@pytest.mark.parametrize(
    ("mode", "architecture", "device", "backend", "loads"),
    [
        ("on", "sd15", "cpu", "inductor", True),
        ("auto", "flux1", "cuda", "inductor", True),
        ("auto", "sd15", "cuda", "inductor", False),
        ("auto", "flux1", "cpu", "inductor", False),
        ("off", "flux1", "cuda", "inductor", False),
        ("on", "flux1", "cuda", "eager", False),
    ],
)
def test_the_compiler_is_loaded_early_where_it_may_be_used(
    mode, architecture, device, backend, loads, monkeypatch, repaid
):
    asked = []
    monkeypatch.setattr("diffquant.runtime.compile_choice.preload", lambda: asked.append(1))
    model, _ = tiny_flux()
    with Compiling(mode, Parts(model, architecture), device, backend=backend):
        pass
    assert bool(asked) == loads


def test_whoever_compiles_waits_until_the_compiler_is_loaded(monkeypatch):
    order = []

    class Thread:
        def join(self):
            order.append("joined")

    monkeypatch.setattr(compiling, "preload", Thread)
    monkeypatch.setattr(torch, "compile", lambda own, **_: order.append("compiled") or own)
    model, call = tiny_flux()
    with compiled(model):
        assert order == []
        call()
    assert order == ["joined", "compiled"] * (len(order) // 2) != []


def test_a_compiler_that_does_not_load_is_no_error_yet(monkeypatch):
    monkeypatch.setattr(compiling, "_COMPILER", ("no_such_module",))
    compiling._load()
