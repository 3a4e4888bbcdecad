"""diffusers reads the LoRAs we write, and the model then draws as the fine-tune does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.lora.conversion import convert_lora
from diffquant.convert.lora.extraction import extract_lora
from diffquant.convert.lora.ranks import Keep

pytestmark = pytest.mark.oracle

MODELS = {
    "sd15-shapes": ("UNet2DConditionModel", "unet", "StableDiffusionPipeline"),
    "flux1-shapes": ("FluxTransformer2DModel", "transformer", "FluxPipeline"),
}


def outputs(torch, model, name):
    """One call on fixed inputs."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    config = model.config
    with torch.no_grad():
        if name == "sd15-shapes":
            return model(
                noise(1, config.in_channels, 16, 16),
                torch.tensor([500]),
                noise(1, 7, config.cross_attention_dim),
            ).sample
        return model(
            hidden_states=noise(1, 16, config.in_channels),
            encoder_hidden_states=noise(1, 5, config.joint_attention_dim),
            pooled_projections=noise(1, config.pooled_projection_dim),
            timestep=torch.tensor([0.5]),
            guidance=torch.tensor([3.5]) if config.guidance_embeds else None,
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample


# Its reader of kohya's Flux files splits linear1 at 3072 and 12288 rows, whatever the file's width.
@pytest.mark.parametrize(
    ("name", "to"),
    [("sd15-shapes", "kohya"), ("sd15-shapes", "diffusers"), ("flux1-shapes", "diffusers")],
)
def test_a_model_with_an_extracted_lora_draws_as_the_fine_tune(
    tmp_path, client, silently, name, to
):
    diffusers, torch = client("diffusers"), client("torch")
    kind, folder, pipeline = MODELS[name]
    base = Path(__file__).parents[2] / "examples" / name
    cls = getattr(diffusers, kind)
    model = silently(cls.from_pretrained, base / folder, torch_dtype=torch.float32)
    plain = outputs(torch, model, name)
    tuned = silently(cls.from_pretrained, base / folder, torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for key, one in tuned.named_parameters():
        if one.ndim == 2 and ".attn" in key:
            factors = (
                torch.randn(shape, generator=generator) * 0.1
                for shape in ((one.shape[0], 2), (2, one.shape[1]))
            )
            up, down = factors
            one.data += up @ down
    silently(tuned.save_pretrained, tmp_path / folder)
    lora = tmp_path / "x.safetensors"
    # kohya names fuse q, k and v of Flux: three changes of rank 2 in one layer
    extract_lora(tmp_path / folder, base / folder, lora, Keep(6), to="kohya", dtype="f32")
    out = lora
    if to != "kohya":
        out = tmp_path / "y.safetensors"
        convert_lora(lora, out, to=to, base=base / folder)
    load = getattr(diffusers, pipeline)
    more = {"unet_config": model.config} if folder == "unet" else {"return_alphas": True}
    state, alphas = silently(load.lora_state_dict, out, **more)
    into = getattr(load, f"load_lora_into_{folder}")
    silently(into, state, alphas, model)
    wanted, found = outputs(torch, tuned, name), outputs(torch, model, name)
    assert not np.allclose(plain, wanted, atol=1e-2)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))
