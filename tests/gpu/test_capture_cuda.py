"""A denoiser's calls as CUDA graphs: pictures are those of calls as they are, bit for bit."""

from pathlib import Path

import pytest
import torch

from diffquant.runtime.capture import captured
from diffquant.runtime.opening import open_pipeline

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
