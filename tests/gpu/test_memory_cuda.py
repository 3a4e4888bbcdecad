"""Rungs on a GPU: copies overlap with work and never change a picture; a real cap is survived."""

import contextlib
from pathlib import Path

import pytest
import torch

from diffquant.runtime.memory.rungs import Rung
from diffquant.runtime.opening import open_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DEMOS = Path(__file__).parents[2] / "examples"
FIELDS = {"width": 128, "height": 128, "steps": 4, "seed": 3}
HALF = {"denoiser": 3, "text_encoder": 1, "text_encoder_2": 1}
RUNGS = (
    Rung("none", "whole", pinned=False),
    Rung("model", "host", pinned=False),
    Rung("blocks", "whole", pinned=True),
    Rung("blocks", "whole", pinned=False, resident=HALF),
    Rung("blocks", "strips", pinned=False),
    Rung("sequential", "host", pinned=True),
    Rung("sequential", "strips", pinned=False),
)


@contextlib.contextmanager
def placed(model, rung, dtype=torch.float32, below=()):
    with contextlib.ExitStack() as files:
        opened = open_pipeline(DEMOS / model, files=files, device="cuda", dtype=dtype)
        opened.placement.settle(rung, below)
        yield opened
        opened.placement.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", ["flux1-shapes", "sdxl-shapes", "qwen-image-shapes"])
@pytest.mark.parametrize("rung", RUNGS, ids=lambda one: f"{one.level}-{one.decoder}-{one.pinned}")
def test_every_rung_gives_the_same_picture(model, rung, dtype):
    eager = open_pipeline(DEMOS / model, device="cuda", dtype=dtype)
    wanted = eager.pipeline.generate("a red circle", **FIELDS)
    with placed(model, rung, dtype) as opened:
        made = opened.pipeline.generate("a red circle", **FIELDS)
    assert torch.equal(made.latents, wanted.latents)
    gap = (made.images - wanted.images).abs()
    most, mean = float(gap.max()), float(gap.mean())
    near = 1e-4 if dtype == torch.float32 else 0.05
    assert (most < near, most, mean)[0], (most, mean)


def test_a_cap_is_survived_by_going_down_the_rungs():
    model = "sdxl-shapes"
    fields = {**FIELDS, "width": 1024, "height": 1024, "steps": 1}
    with placed(model, RUNGS[0]) as opened:
        wanted = opened.pipeline.generate("a red circle", **fields)
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    with placed(model, RUNGS[0], below=RUNGS[1:]) as opened:
        torch.cuda.set_per_process_memory_fraction(most * 0.6 / total, 0)
        try:
            made = opened.pipeline.generate("a red circle", **fields)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, 0)
        assert opened.placement.steps
        assert torch.cuda.max_memory_reserved() <= most * 0.6 + (2 << 20)
    assert (made.images - wanted.images).abs().max() < 1e-3
