"""The autoencoder against diffusers' AutoencoderKL."""

import pytest
import torch

from diffquant.core.errors import ArchitectureError
from diffquant.runtime.loading import build
from diffquant.runtime.models.autoencoder import to_pixels
from diffquant.runtime.models.vae_kl import config_from

CASES = {
    "sd": {"latent_channels": 4, "scaling_factor": 0.18215},
    "flux": {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "three levels": {
        "block_out_channels": (32, 64, 48),
        "layers_per_block": 1,
        "norm_num_groups": 16,
    },
    "no attention": {"mid_block_add_attention": False},
}


@pytest.mark.oracle
@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_both_ways_equal_diffusers(name, convolutions, oracle):
    config = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 2, **CASES[name]}
    levels = len(config["block_out_channels"])
    reference = oracle.diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **config,
    )
    oracle.randomize(reference, seed=7)
    weights = oracle.vae_weights(reference, convolutions=convolutions)
    ours = build("vae_kl", weights, reference.config)
    assert ours.config.factor == 2 ** (levels - 1)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 40, 24, generator=generator).tanh()
    with torch.no_grad():
        wanted = reference.encode(pixels).latent_dist
        mean, logvar = ours.encode(pixels)
        oracle.assert_close(mean, wanted.mean)
        oracle.assert_close(logvar, wanted.logvar)
        oracle.assert_close(ours.decode(mean), reference.decode(wanted.mean).sample)


@pytest.mark.oracle
def test_half_an_autoencoder_is_enough(oracle):
    reference = oracle.randomize(
        oracle.diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), seed=1
    )
    weights = oracle.vae_weights(reference)
    keep = ("decoder.", "post_quant_conv.")
    ours = build(
        "vae_kl", {k: v for k, v in weights.items() if k.startswith(keep)}, reference.config
    )
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        oracle.assert_close(ours.decode(z), reference.decode(z).sample)


def test_factors_default_by_latent_channels():
    assert (
        config_from(
            {"decoder.conv_in.weight": (8, 16, 3, 3), "decoder.conv_out.weight": (3, 8, 3, 3)}
            | {"decoder.up.0.block.0.conv1.weight": (8, 8, 3, 3)},
            {},
        ).shift_factor
        == 0.1159
    )


def test_unsupported_activation_is_refused():
    with pytest.raises(ArchitectureError, match="act_fn"):
        config_from({}, {"act_fn": "relu"})


def test_pixels_are_clipped_and_channels_last():
    decoded = torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1)
    assert to_pixels(decoded).tolist() == [[[[0.0, 0.5, 1.0]]]]
