"""A denoiser's calls as CUDA graphs: pictures are those of calls as they are, bit for bit."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffquant.runtime.capture import captured
from diffquant.runtime.engines import EngineFiles, bundled
from diffquant.runtime.graph_choice import Graphs
from diffquant.runtime.job import Job
from diffquant.runtime.layers import PackedLayer
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.session import generate_pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DEMOS = Path(__file__).parents[2] / "examples"
FIELDS = {"width": 128, "height": 128, "steps": 6, "seed": 3}


@pytest.mark.parametrize(
    "model", ["flux1-shapes", "sd15-shapes", "sdxl-shapes", "qwen-image-shapes"]
)
def test_replayed_calls_have_the_numbers_of_calls_as_they_are(model):
    opened = open_pipeline(DEMOS / model, device="cuda", dtype=torch.bfloat16)
    wanted = opened.pipeline.generate("a red circle", **FIELDS)
    with captured(opened.pipeline.parts.denoiser) as state:
        made = opened.pipeline.generate("a red circle", **FIELDS)
    assert state.failed == ""
    assert state.graphs >= 1
    assert state.plain <= 2  # once for each shape: guided calls may be two
    assert torch.equal(made.latents, wanted.latents)


def test_weights_that_moved_are_captured_anew_on_a_card():
    """Graphs are dropped and made again in the pool they shared; numbers stay."""
    opened = open_pipeline(DEMOS / "flux1-shapes", device="cuda", dtype=torch.bfloat16)
    denoiser = opened.pipeline.parts.denoiser
    with captured(denoiser) as state:
        first = opened.pipeline.generate("a red circle", **FIELDS)
        before, kept = state.captured, []
        for layer in denoiser.modules():
            if isinstance(layer, PackedLayer) and layer.packed is not None and layer.home is None:
                kept.append(layer.packed)  # so that no copy comes to lie where it lay
                layer.replace(layer.packed.copy())
        again = opened.pipeline.generate("a red circle", **FIELDS)
    assert state.failed == ""
    assert state.captured == 2 * before > 0
    assert torch.equal(first.latents, again.latents)


@pytest.fixture
def no_collection():
    """Python collects garbage when a test says so."""
    before = gc.get_threshold()
    gc.set_threshold(1 << 30)
    yield
    gc.set_threshold(*before)


def test_a_dead_graph_does_not_end_a_capture(no_collection):
    """One in a cycle, which Python's next collection would destroy while another is captured."""
    opened = open_pipeline(DEMOS / "flux1-shapes", device="cuda", dtype=torch.bfloat16)
    denoiser, dead, met = opened.pipeline.parts.denoiser, {}, []
    with captured(denoiser):
        opened.pipeline.generate("a red circle", **FIELDS)
        dead["graphs"] = dict(vars(denoiser.forward)["_seen"])
    assert any(dead["graphs"].values())
    dead["itself"] = dead
    del dead

    def collect(*_given):
        if torch.cuda.is_current_stream_capturing():
            gc.set_threshold(1)
            met.append([[] for _ in range(1000)])  # as many objects as call for a collection

    hook = next(iter(denoiser.children())).register_forward_pre_hook(collect)
    with captured(denoiser) as state:
        opened.pipeline.generate("a red circle", **FIELDS)
    hook.remove()
    assert met
    assert state.failed == ""
    assert state.replayed > 0


@pytest.mark.parametrize("compute", ["exact", "int8", "fp8"])
@pytest.mark.parametrize("model", ["flux1-shapes", "sdxl-shapes", "qwen-image-shapes"])
def test_generate_captures_by_itself_and_draws_the_same(model, compute, tmp_path):
    """From the job on: what the first step finds out (layers in 8 bits) is waited for."""
    made = {}
    for graphs in ("off", "auto"):
        fields = {**FIELDS, "width": 256, "height": 256, "prompt": "a red circle"}
        out = tmp_path / f"{graphs}.png"
        job = Job(
            DEMOS / model, out, fields, device="cuda", graphs=graphs, compute=compute, compile="off"
        )
        report = generate_pictures(job)
        made[graphs] = out, report.graphs["denoise"], report.computing
    assert made["off"][1] == "no CUDA graph: asked for"
    assert made["auto"][1].startswith("CUDA graph: ")
    assert (compute == "exact") == (not made["auto"][2])
    pictures = [np.asarray(Image.open(path)) for path, *_ in made.values()]
    assert np.array_equal(*pictures)


def test_judged_pictures_are_those_of_calls_as_they_are(monkeypatch):
    """What `verify` and `compare` draw, twice in one opened model."""
    side = bundled.open_side(EngineFiles(DEMOS / "sdxl-shapes", device="cuda", dtype="bfloat16"))
    request = PictureRequest("a red circle", steps=6, width=128, height=128)
    made = [side.draw(request) for _ in range(2)]
    assert "; CUDA graph: " in side.how
    monkeypatch.setattr(bundled, "Graphs", lambda _mode, *args: Graphs("off", *args))
    made.append(side.draw(request))
    assert side.how.endswith("; no CUDA graph: asked for")
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card here")
def test_a_card_that_is_not_the_current_one_is_captured_too():
    """A graph captured on the current card would be empty, and every picture its second step."""
    made = {}
    for graphs in ("off", "auto"):
        side = bundled.open_side(
            EngineFiles(DEMOS / "flux1-shapes", device="cuda:1", dtype="bfloat16")
        )
        with Graphs(graphs, side.opened.pipeline.parts, "cuda:1", FIELDS["steps"]) as found:
            made[graphs] = side.opened.pipeline.generate("a red circle", **FIELDS).latents
    assert found.said.startswith("CUDA graph: ")
    assert torch.equal(made["off"], made["auto"])
