"""The UNet against diffusers' UNet2DConditionModel."""

import pytest
import torch

from diffquant.core.errors import ArchitectureError, MissingKeys
from diffquant.runtime.loading import build
from diffquant.runtime.models import unet, unet_config

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"

SD15 = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": (CROSS, CROSS, PLAIN),
    "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP),
    "cross_attention_dim": 48,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}
CASES = {
    "sd15": (SD15, (8, 16)),
    "sd15 odd size": (SD15, (9, 13)),
    "sd15 one layer, other heads": (
        {**SD15, "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 16},
        (8, 8),
    ),
    "sd2": (
        {**SD15, "attention_head_dim": (1, 2, 2), "use_linear_projection": True, "norm_eps": 1e-6},
        (16, 8),
    ),
    "sdxl": (
        {
            "block_out_channels": (32, 64, 96),
            "down_block_types": (PLAIN, CROSS, CROSS),
            "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
            "attention_head_dim": (1, 2, 3),
            "transformer_layers_per_block": (1, 2, 3),
            "cross_attention_dim": 40,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 16,
            "projection_class_embeddings_input_dim": 6 * 16 + 24,
            "layers_per_block": 2,
        },
        (8, 12),
    ),
    "inpainting": ({**SD15, "in_channels": 9}, (8, 8)),
    "lcm": ({**SD15, "time_cond_proj_dim": 24}, (8, 8)),
    "lcm odd width": ({**SD15, "time_cond_proj_dim": 17}, (8, 8)),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_prediction_equals_diffusers(name, oracle):
    config, (height, width) = CASES[name]
    reference = oracle.diffusers.UNet2DConditionModel(
        **{"in_channels": 4, "out_channels": 4, **config}
    )
    oracle.randomize(reference, seed=len(name))
    ours = build("unet", oracle.unet_weights(reference), reference.config)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, ours.config.in_channels, height, width, generator=generator)
    t = torch.tensor([801.0, 23.0])
    context = torch.randn(2, 7, config["cross_attention_dim"], generator=generator)
    added, label = None, None
    if ours.config.label:
        pooled = torch.randn(2, 24, generator=generator)
        ids = torch.tensor([[64, 128, 0, 0, 64, 128], [32, 32, 1, 2, 32, 32]])
        added = {"text_embeds": pooled, "time_ids": ids}
        sizes = unet.timestep_embedding(ids.flatten(), 16).reshape(2, -1)
        label = torch.cat((pooled, sizes), dim=1)
    strength = torch.tensor([8.0, 1.5])
    guided = None
    if width := config.get("time_cond_proj_dim"):
        from diffusers import LatentConsistencyModelPipeline as Lcm

        guided = Lcm.get_guidance_scale_embedding(None, strength - 1, width)
    with torch.no_grad():
        wanted = reference(x, t, context, timestep_cond=guided, added_cond_kwargs=added).sample
        found = ours(x, t, context, label, strength)
    oracle.assert_close(found, wanted)


def test_heads_default_to_the_real_models():
    shapes = {"a.proj_in.weight": (320, 320, 1, 1), "b.proj_in.weight": (640, 640)}
    assert unet_config._heads({}, shapes, "a", 0, 320) == 8
    assert unet_config._heads({}, shapes, "b", 0, 640) == 10


def test_head_count_wins_over_the_misnamed_head_dim():
    assert (
        unet_config._heads({"num_attention_heads": [2, 4], "attention_head_dim": 8}, {}, "a", 1, 64)
        == 4
    )


def test_unsupported_activation_is_refused():
    with pytest.raises(ArchitectureError, match="act_fn is 'mish'"):
        unet.config_from({}, {"act_fn": "mish"})


def test_empty_part_names_the_missing_key():
    with pytest.raises(MissingKeys, match="input_blocks"):
        unet.config_from({}, {})
