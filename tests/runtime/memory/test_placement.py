"""The same picture on every rung, and after every error of memory."""

import contextlib
from pathlib import Path

import pytest
import torch

from diffquant.core.errors import ResourceError
from diffquant.runtime.control import damaged
from diffquant.runtime.layers import PackedLayer, QuantEmbedding
from diffquant.runtime.memory.placement import out_of_memory
from diffquant.runtime.memory.rungs import Rung
from diffquant.runtime.memory.stream import Stream
from diffquant.runtime.opening import open_pipeline

DEMOS = Path(__file__).parents[3] / "examples"
SMALL = {"width": 64, "height": 64, "steps": 2, "seed": 3}
RUNGS = (
    Rung("none", "whole", pinned=False),
    Rung("model", "strips", pinned=False),
    Rung("blocks", "whole", pinned=False, resident={"denoiser": 1, "text_encoder": 1}),
    Rung("blocks", "strips", pinned=False),
    Rung("sequential", "strips", pinned=False),
)


@pytest.fixture(scope="module", params=["flux1-shapes", "sdxl-shapes", "qwen-image-shapes"])
def demo(request):
    return DEMOS / request.param


@pytest.fixture(scope="module")
def wanted(demo):
    return open_pipeline(demo).pipeline.generate("a red circle", **SMALL)


@contextlib.contextmanager
def placed(model, rung, below=()):
    with contextlib.ExitStack() as files:
        opened = open_pipeline(model, files=files)
        opened.placement.settle(rung, below)
        yield opened
        opened.placement.release()


def layers(opened):
    return [
        layer
        for module in opened.modules.values()
        for layer in module.modules()
        if isinstance(layer, PackedLayer)
    ]


@pytest.mark.parametrize("rung", RUNGS, ids=lambda one: f"{one.level}-{one.decoder}")
def test_every_rung_gives_the_same_picture(demo, wanted, rung):
    with placed(demo, rung) as opened:
        made = opened.pipeline.generate("a red circle", **SMALL)
        assert torch.equal(made.latents, wanted.latents)
        if rung.decoder == "whole":
            assert torch.equal(made.images, wanted.images)
        else:  # statistics of norms are added up in another order
            assert (made.images - wanted.images).abs().max() < 1e-4


def test_nothing_is_loaded_before_it_is_asked_for():
    with placed(DEMOS / "flux1-shapes", RUNGS[0]) as opened:
        assert all(layer.packed.device.type == "meta" for layer in layers(opened))
        assert all(layer.device == torch.device("cpu") for layer in layers(opened))


def test_at_level_model_one_part_is_there_at_a_time():
    with placed(DEMOS / "flux1-shapes", RUNGS[1]) as opened:
        opened.pipeline.generate("a red circle", **SMALL)
        there = {
            name
            for name, module in opened.modules.items()
            for layer in module.modules()
            if isinstance(layer, PackedLayer) and layer.packed.device.type != "meta"
        }
        assert there == {"vae"}


@pytest.mark.parametrize(
    ("level", "here"), [("none", True), ("model", True), ("blocks", False), ("sequential", False)]
)
def test_tables_of_tokens_stay_on_the_host_where_weights_stream(level, here):
    """Even of a part whose blocks all stay: the planner does not count them either."""
    every = {"denoiser": 99, "text_encoder": 99, "text_encoder_2": 99} if level == "blocks" else {}
    rung = Rung(level, "whole", pinned=False, resident=every)
    with placed(DEMOS / "flux1-shapes", rung) as opened:
        text = opened.modules["text_encoder"]
        text(torch.zeros(1, 7, dtype=torch.int64))
        tables = [layer for layer in text.modules() if isinstance(layer, QuantEmbedding)]
        assert tables
        assert all((layer.packed.device.type == "cpu") == here for layer in tables)


def test_at_level_none_parts_stay():
    with placed(DEMOS / "flux1-shapes", RUNGS[0]) as opened:
        opened.pipeline.generate("a red circle", **SMALL)
        assert all(layer.packed.device.type == "cpu" for layer in layers(opened))
        opened.placement.release()
        assert all(layer.packed.device.type == "meta" for layer in layers(opened))


class Fails:
    """Out of memory at the n-th asks of a layer's weight."""

    def __init__(self, monkeypatch, *calls, error=torch.OutOfMemoryError):
        self.count, self.calls = 0, calls
        real = PackedLayer.weight

        def weight(layer, dtype):
            self.count += 1
            if self.count in calls:
                raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(layer, dtype)

        monkeypatch.setattr(PackedLayer, "weight", weight)


@pytest.mark.parametrize("call", [3, 30, 70])
def test_out_of_memory_goes_a_rung_down_and_changes_nothing(monkeypatch, call):
    model = DEMOS / "flux1-shapes"
    wanted = open_pipeline(model).pipeline.generate("a red circle", **SMALL)
    with placed(model, RUNGS[0], RUNGS[2:]) as opened:
        fails = Fails(monkeypatch, call)
        made = opened.pipeline.generate("a red circle", **SMALL)
        assert fails.count > call
        assert (made.images - wanted.images).abs().max() < 1e-4
        (step,) = opened.placement.steps
        assert "out of memory at offload none, run again at offload blocks" in step


def test_out_of_memory_twice_goes_two_rungs_down(monkeypatch):
    with placed(DEMOS / "flux1-shapes", RUNGS[0], RUNGS[2:]) as opened:
        Fails(monkeypatch, 30, 31)
        opened.pipeline.generate("a red circle", **SMALL)
        assert len(opened.placement.steps) == 2
        assert opened.placement.rung.level == "blocks"


def test_noise_is_drawn_again_when_encoding_a_picture_ran_out(monkeypatch):
    model, image = DEMOS / "flux1-shapes", torch.rand(1, 64, 64, 3)
    fields = {**SMALL, "steps": 4, "image": image, "strength": 0.6}
    wanted = open_pipeline(model).pipeline.generate("a red circle", **fields)
    with placed(model, RUNGS[0], RUNGS[1:]) as opened:
        encoder = opened.modules["vae"].encode
        tries = []

        def encode(pixels):
            found = encoder(pixels)
            tries.append(1)
            if len(tries) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        monkeypatch.setattr(opened.modules["vae"], "encode", encode)
        opened.placement.settle(RUNGS[0], (Rung("model", "whole", pinned=False),))
        made = opened.pipeline.generate("a red circle", **fields)
        assert len(tries) == 2
        assert torch.equal(made.latents, wanted.latents)


def test_without_a_rung_below_it_is_an_error_that_says_what_to_do(monkeypatch):
    with placed(DEMOS / "flux1-shapes", RUNGS[-1]) as opened:
        Fails(monkeypatch, 3)
        with pytest.raises(ResourceError, match="make a smaller picture, or use a smaller type"):
            opened.pipeline.generate("a red circle", **SMALL)


def test_other_errors_pass_through(monkeypatch):
    with placed(DEMOS / "flux1-shapes", RUNGS[0], RUNGS[1:]) as opened:
        Fails(monkeypatch, 3, error=lambda _text: RuntimeError("shapes do not match"))
        with pytest.raises(RuntimeError, match="shapes do not match"):
            opened.pipeline.generate("a red circle", **SMALL)
        assert opened.placement.steps == []


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 6 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of range"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_memory):
    assert out_of_memory(error) is is_memory


@pytest.mark.parametrize("rung", RUNGS, ids=lambda one: f"{one.level} {one.decoder}")
@pytest.mark.parametrize("drawn", [False, True])
def test_a_damaged_block_stays_damaged_wherever_weights_live(rung, drawn):
    model = DEMOS / "sdxl-shapes"
    whole = open_pipeline(model)
    clean = whole.pipeline.generate("a red circle", **SMALL).latents
    with damaged(whole.modules["denoiser"]):
        broken = whole.pipeline.generate("a red circle", **SMALL).latents
    assert not torch.equal(clean, broken)
    with placed(model, rung) as opened:
        if drawn:  # parts have come and gone: the denoiser is away where one is there at a time
            opened.pipeline.generate("a red circle", **SMALL)
        with damaged(opened.modules["denoiser"]):
            for _ in range(2):
                found = opened.pipeline.generate("a red circle", **SMALL).latents
                assert torch.equal(found, broken)
        assert torch.equal(opened.pipeline.generate("a red circle", **SMALL).latents, clean)
        opened.placement.release()
        layers = [one for one in opened.modules["denoiser"].modules() if hasattr(one, "packed")]
        assert {one.packed.device.type for one in layers if one.stored is not None} == {"meta"}


def test_host_memory_that_could_not_be_locked_is_told(monkeypatch):
    monkeypatch.setattr(Stream, "unlocked", 3 << 20)
    with placed(DEMOS / "sdxl-shapes", RUNGS[3]) as opened:
        opened.pipeline.generate("a red circle", **SMALL)
        (told,) = [one for one in opened.placement.steps if one.startswith("denoiser")]
        assert "3 MiB of host memory could not be page-locked" in told
