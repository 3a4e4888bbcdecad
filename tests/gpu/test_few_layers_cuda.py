"""Layers called with few rows, in a whole model on a card: by the kernel, and as decoded first."""

from pathlib import Path

import pytest
import torch

from diffquant.quant.backends import backend
from diffquant.runtime.compute import card_of
from diffquant.runtime.few_rows import FEW, ExactLayer
from diffquant.runtime.kernels import products
from diffquant.runtime.layers import PackedWeight, QuantLinear, Segment
from diffquant.runtime.low_bit import apply
from diffquant.runtime.opening import open_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DEMOS = Path(__file__).parents[2] / "examples"
FIELDS = {"width": 128, "height": 128, "steps": 4, "seed": 3}
DEVICE = "cuda"


def pack(denoiser, fmt):
    """Linear layers whose rows are whole blocks, in a format."""
    encode = backend(fmt, "encode", "reference")
    for layer in denoiser.modules():
        if isinstance(layer, QuantLinear) and layer.logical_shape[1] % 32 == 0:
            rows = encode(layer.weight(torch.float32).cpu().numpy(), None, fmt=fmt)["weight"]
            parts = {"weight": torch.from_numpy(rows).to(DEVICE)}
            layer.bind(PackedWeight((Segment(fmt, layer.logical_shape, parts),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["flux1-shapes", "sdxl-shapes", "qwen-image-shapes"])
def test_pictures_are_those_of_weights_that_are_decoded_first(model, dtype, monkeypatch):
    """Relative 1e-4 and 0.05: sums in another order, over four steps in 23 and in 8 bits."""
    opened = open_pipeline(DEMOS / model, device=DEVICE, dtype=dtype)
    denoiser, asked = opened.pipeline.parts.denoiser, []
    pack(denoiser, "q8_0")
    wanted = opened.pipeline.generate("a red circle", **FIELDS).latents.double()

    def counted(x, *given):
        asked.append(len(x))
        return few_rows(x, *given)

    few_rows = products.few_rows
    monkeypatch.setattr(products, "few_rows", counted)
    apply(denoiser, "exact", card_of(DEVICE))
    found = opened.pipeline.generate("a red circle", **FIELDS).latents.double()
    assert max(asked) <= FEW
    kinds = [one.product for one in denoiser.modules() if isinstance(one, QuantLinear)]
    assert all(isinstance(one, ExactLayer) for one in kinds)
    gap = (found - wanted).norm() / wanted.norm()
    assert gap < (1e-4 if dtype == torch.float32 else 0.05)
