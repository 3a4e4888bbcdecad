"""The Flux transformer against diffusers' FluxTransformer2DModel."""

import pytest
import torch

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.loading import build
from diffquant.runtime.models import flux

CASES = {
    "dev": {"guidance_embeds": True},
    "schnell": {"guidance_embeds": False, "num_layers": 1, "num_single_layers": 3},
    "three heads": {
        "guidance_embeds": True,
        "num_attention_heads": 3,
        "axes_dims_rope": (8, 12, 12),
    },
    "fill": {"guidance_embeds": True, "in_channels": 24, "out_channels": 16},
}


def tiny(oracle, **changes):
    config = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        **changes,
    }
    config["attention_head_dim"] = sum(config["axes_dims_rope"])
    model = oracle.diffusers.FluxTransformer2DModel(**config)
    return oracle.randomize(model, seed=3)


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_prediction_equals_diffusers(name, oracle):
    reference = tiny(oracle, **CASES[name])
    ours = build("flux", oracle.flux_weights(reference), reference.config)
    generator = torch.Generator().manual_seed(1)
    height, width = 6, 10
    img = torch.randn(2, 15, ours.config.in_channels, generator=generator)
    txt = torch.randn(2, 5, 24, generator=generator)
    pooled = torch.randn(2, 20, generator=generator)
    t = torch.tensor([0.75, 0.31])
    guidance = torch.tensor([3.5, 1.0]) if ours.config.guidance else None
    img_ids, txt_ids = flux.image_ids(height, width), torch.zeros(5, 3)
    with torch.no_grad():
        wanted = reference(
            hidden_states=img,
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=txt,
            txt_ids=txt_ids,
            img_ids=img_ids,
        ).sample
        found = ours(img, t, txt, pooled, img_ids, txt_ids, guidance)
    oracle.assert_close(found, wanted)


@pytest.mark.oracle
def test_guidance_must_fit_the_model(oracle):
    reference = tiny(oracle, guidance_embeds=False)
    ours = build("flux", oracle.flux_weights(reference), reference.config)
    zeros = torch.zeros
    inputs = (zeros(1, 1, 16), zeros(1), zeros(1, 1, 24), zeros(1, 20), zeros(1, 3), zeros(1, 3))
    with pytest.raises(UsageError, match="takes no guidance"):
        ours(*inputs, zeros(1))


def test_packing_is_undone():
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = flux.pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert tokens[0, 0, :4].tolist() == [0, 1, 6, 7]  # one channel's 2x2 pixels are neighbours
    assert torch.equal(flux.unpack(tokens, 4, 6), latents)


def test_rotary_axes_must_fill_the_head():
    shapes = {
        "img_in.weight": (256, 64),
        "double_blocks.0.img_attn.norm.query_norm.scale": (64,),
    }
    with pytest.raises(ArchitectureError, match="do not add up to the head width 64"):
        flux.config_from(shapes, {})
