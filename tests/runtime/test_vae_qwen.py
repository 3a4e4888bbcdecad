"""The autoencoder of Qwen-Image and Wan 2.1 against diffusers' two classes of it."""

import pytest
import torch

from diffquant.core.errors import ArchitectureError, MissingKeys
from diffquant.runtime.layers import PackedWeight, Segment
from diffquant.runtime.loading import build

CASES = {
    "as published, thin": {},
    "other widths and depths": {
        "base_dim": 6,
        "dim_mult": [1, 3, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, False],
        "z_dim": 5,
        "latents_mean": [0.1, -0.2, 0.3, -0.4, 0.5],
        "latents_std": [1.5, 2.0, 0.5, 3.0, 1.0],
    },
}

# The same norms amplify the rounding of sums, whose order oneDNN chooses by the processor. Off the
# decoder in float64, of a largest value of 0.9, diffusers' own in float32 is 0.9e-5 and ours 1.3e-5
# with AVX2 (0.6e-5 and 1.2e-5 with SSE4.1): three times that.
ROUNDING = 4e-5


def tiny(oracle, name="AutoencoderKLQwenImage", **changes):
    config = {"base_dim": 4, "dim_mult": [1, 2, 4, 4], **changes}
    return oracle.randomize(getattr(oracle.diffusers, name)(**config), seed=2)


def weights_of(reference):
    return {key: PackedWeight.of(value) for key, value in reference.state_dict().items()}


def pictures(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, height, width, generator=generator) * 2 - 1


@pytest.mark.oracle
@pytest.mark.parametrize("size", [(24, 40), (8, 56)], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["AutoencoderKLQwenImage", "AutoencoderKLWan"])
def test_both_ways_equal_diffusers(kind, name, size, oracle):
    reference = tiny(oracle, kind, **CASES[name])
    ours = build("vae_qwen", weights_of(reference), reference.config)
    pixels = pictures(*size)
    with torch.no_grad():
        theirs = reference.encode(pixels[:, :, None]).latent_dist
        mean, logvar = ours.encode(pixels)
        oracle.assert_close(mean[:, :, None], theirs.mean)
        oracle.assert_close(logvar[:, :, None], theirs.logvar)
        assert mean.shape[1] == ours.config.latents
        assert [side // ours.config.factor for side in size] == list(mean.shape[2:])
        # Both decode the same latents: thirty norms over 4 to 16 channels make a difference of
        # theirs up to 25 times larger.
        wanted = reference.double().decode(theirs.mean.double()).sample[:, :, 0]
        found = ours.decode(theirs.mean[:, :, 0]).clamp(-1, 1)  # diffusers clips, we when drawing
        oracle.assert_close(found.double(), wanted, ROUNDING)


@pytest.mark.oracle
def test_latents_are_normed_channel_by_channel(oracle):
    reference = tiny(oracle, **CASES["other widths and depths"])
    ours = build("vae_qwen", weights_of(reference), reference.config)
    z = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    for channel, (mean, std) in enumerate(zip(ours.config.mean, ours.config.std, strict=True)):
        wanted = (z[:, channel] - mean) / std
        torch.testing.assert_close(ours.scale(z)[:, channel], wanted)
    torch.testing.assert_close(ours.unscale(ours.scale(z)), z)


@pytest.mark.oracle
def test_published_statistics_are_used_where_the_config_is_silent(oracle):
    reference = tiny(oracle)
    ours = build("vae_qwen", weights_of(reference), {})
    assert list(ours.config.mean) == reference.config.latents_mean
    assert list(ours.config.std) == reference.config.latents_std


@pytest.mark.oracle
def test_bad_statistics_are_refused(oracle):
    weights = weights_of(tiny(oracle, **CASES["other widths and depths"]))
    with pytest.raises(
        ArchitectureError, match="expected one number for each of 5 latent channels"
    ):
        build("vae_qwen", weights, {})
    with pytest.raises(ArchitectureError, match="latents_std must be positive, found 0"):
        build("vae_qwen", weights, {"latents_mean": [0] * 5, "latents_std": [1, 0, 1, 1, 1]})
    del weights["decoder.up_blocks.0.resnets.1.conv2.bias"]
    with pytest.raises(MissingKeys, match=r"decoder\.up_blocks\.0\.resnets\.1\.conv2\.bias"):
        build("vae_qwen", weights, {"latents_mean": [0] * 5, "latents_std": [1] * 5})


@pytest.mark.oracle
def test_packed_kernels_stay_packed_and_give_what_their_values_give(oracle):
    gguf = pytest.importorskip("gguf")
    sizes = {"base_dim": 32, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}
    reference = tiny(oracle, **sizes)
    weights = weights_of(reference)
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = {}
    for key, weight in weights.items():
        if len(weight.shape) == 5 and weight.shape[1] == 32:  # rows of whole blocks
            value = weight.dequantize(torch.float32).flatten(1).numpy()
            blocks = torch.from_numpy(gguf.quants.quantize(value, kind))
            packed[key] = PackedWeight((Segment("q8_0", weight.shape, {"weight": blocks}),))
    assert len(packed) > 10
    values = {key: PackedWeight.of(one.dequantize(torch.float32)) for key, one in packed.items()}
    ours = build("vae_qwen", {**weights, **packed}, reference.config)
    plain = build("vae_qwen", {**weights, **values}, reference.config)
    conv = ours.get_submodule("decoder.mid_block.resnets.0.conv1")
    assert conv.packed.formats == ("q8_0",)
    z = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.decode(z), plain.decode(z))
