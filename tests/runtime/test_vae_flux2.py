"""Flux.2's autoencoder against diffusers' AutoencoderKLFlux2 and what its pipelines do around."""

import re

import pytest
import torch

from diffquant.core.errors import UnsupportedShape
from diffquant.runtime.layers import PackedWeight
from diffquant.runtime.loading import build
from diffquant.runtime.models.vae_flux2 import config_from

CASES = {
    "as published, narrow": {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2},
    "three levels, other eps": {
        "block_out_channels": (16, 32, 32),
        "norm_num_groups": 8,
        "latent_channels": 8,
        "batch_norm_eps": 0.1,
    },
    "nothing around the halves": {
        "block_out_channels": (32, 64),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
}


def tiny(oracle, seed=7, **changes):
    levels = len(changes["block_out_channels"])
    vae = oracle.diffusers.AutoencoderKLFlux2(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "latent_channels": 16,
            **changes,
        }
    )
    oracle.randomize(vae, seed=seed)
    vae.bn.running_var.abs_()
    return vae


def weights(oracle, vae):
    """Single-file weights: the quantizing convolutions inside the halves."""
    return {
        re.sub("^quant_conv", "encoder.quant_conv", re.sub("^post_", "decoder.post_", key)): (
            PackedWeight.of(value.float())
        )
        for key, value in oracle.vae_state(vae).items()
    }


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_both_ways_equal_diffusers(name, oracle):
    reference = tiny(oracle, **CASES[name])
    ours = build("vae_flux2", weights(oracle, reference), reference.config)
    klein = oracle.diffusers.Flux2KleinPipeline
    levels = len(CASES[name]["block_out_channels"])
    channels = reference.config.latent_channels
    assert (ours.config.latents, ours.config.factor) == (4 * channels, 2**levels)

    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 3 * 2**levels, 2**levels, generator=generator).tanh()
    mean = reference.bn.running_mean[:, None, None]
    deviation = torch.sqrt(reference.bn.running_var + reference.config.batch_norm_eps)
    deviation = deviation[:, None, None]
    with torch.no_grad():
        wanted = reference.encode(pixels).latent_dist
        z, logvar = ours.encode(pixels)
        oracle.assert_close(z, klein._patchify_latents(wanted.mean))
        oracle.assert_close(logvar, klein._patchify_latents(wanted.logvar))
        latents = (klein._patchify_latents(wanted.mean) - mean) / deviation
        oracle.assert_close(ours.scale(z), latents)
        unfolded = klein._unpatchify_latents(latents * deviation + mean)
        oracle.assert_close(ours.decode(ours.unscale(latents)), reference.decode(unfolded).sample)


@pytest.mark.oracle
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_an_autoencoder_is_enough_and_the_count_of_batches_is_not_needed(half, oracle):
    reference = tiny(oracle, block_out_channels=(32,))
    kept = {
        key: one
        for key, one in weights(oracle, reference).items()
        if key.startswith((f"{half}.", "bn.running_"))
    }
    ours = build("vae_flux2", kept, reference.config)
    assert (ours.config.latents, ours.config.factor) == (64, 2)


def test_statistics_must_be_of_folded_latents():
    shapes = {
        "decoder.conv_in.weight": (8, 16, 3, 3),
        "decoder.conv_out.weight": (3, 8, 3, 3),
        "decoder.up.0.block.0.conv1.weight": (8, 8, 3, 3),
        "bn.running_mean": (16,),
    }
    with pytest.raises(UnsupportedShape, match="expected 64 channels, found 16"):
        config_from(shapes, {})
