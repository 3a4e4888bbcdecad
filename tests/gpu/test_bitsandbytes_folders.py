"""diffusers loads our bitsandbytes folders on a GPU, and bitsandbytes decodes what we decode.

Needs diffusers, bitsandbytes and what quantizes (numba, gguf); skips where one of them is missing.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    pytest.mark.filterwarnings("ignore"),
]
EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = {
    "sd15-shapes": ("unet", "UNet2DConditionModel"),
    "flux1-shapes": ("transformer", "FluxTransformer2DModel"),
}


def imported(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.parametrize("kind", ["nf4", "nf4_dq", "fp4", "int8_bnb"])
@pytest.mark.parametrize("model", MODELS)
def test_decoded_weights_are_ours(tmp_path, model, kind):
    for name in ("numba", "gguf"):
        imported(name)
    diffusers, functional = imported("diffusers"), imported("bitsandbytes.functional")
    from diffquant.convert.jobs import opened, run_job
    from diffquant.convert.plan import Request
    from diffquant.quant.types import type_named

    run_job(EXAMPLES / model, tmp_path / "out", Request("folder", type=type_named(kind)))
    name, cls = MODELS[model]
    net = getattr(diffusers, cls).from_pretrained(
        tmp_path / "out", subfolder=name, torch_dtype=torch.float16
    )
    wanted = "Linear8bitLt" if kind == "int8_bnb" else "Linear4bit"
    packed = {k: m.weight for k, m in net.named_modules() if type(m).__name__ == wanted}
    assert packed
    with opened(tmp_path / "out") as (_, logical, _):
        keys = {
            key.removeprefix(f"{name}/").removesuffix(".weight"): key
            for key, tensor in logical.tensors.items()
            if tensor.format == kind
        }
        assert keys.keys() == packed.keys()
        for module, weight in packed.items():
            assert weight.device.type == "cuda"
            if kind == "int8_bnb":
                decoded = functional.int8_vectorwise_dequant(weight.data, weight.SCB).float()
            else:
                decoded = functional.dequantize_4bit(weight.data, weight.quant_state).float()
            mine = torch.from_numpy(logical.read(keys[module])).cuda().reshape(decoded.shape)
            # It decodes to a 16-bit type: half a unit in the last of 8 bits.
            bound = mine.abs() * 2.0**-8 + 1e-8
            assert bool(((decoded - mine).abs() <= bound).all()), module
