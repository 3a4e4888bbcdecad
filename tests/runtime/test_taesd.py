"""Tiny autoencoders against diffusers' AutoencoderTiny, and against a recorded round trip."""

from pathlib import Path

import pytest
import torch

from diffquant.convert.binding import bind
from diffquant.convert.detect import detect_component
from diffquant.core.errors import ArchitectureError, MissingKeys
from diffquant.io import open_source
from diffquant.runtime.layers import PackedLayer, PackedWeight, Segment
from diffquant.runtime.loading import build, model_for
from diffquant.runtime.models.taesd import config_from
from diffquant.runtime.packing import packed_weights

REAL = Path(__file__).parents[3] / "shared" / "data" / "real" / "taesd"

CASES = {
    "taesd": {},
    "taef1": {"latent_channels": 16},
    "two levels": {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 2, 1),
        "num_decoder_blocks": (2, 1, 1),
    },
}


def tiny(oracle, **changes):
    config = {
        "encoder_block_out_channels": (16,) * 4,
        "decoder_block_out_channels": (16,) * 4,
        **changes,
    }
    return oracle.randomize(oracle.diffusers.AutoencoderTiny(**config), seed=5)


def packed(state):
    return {key: PackedWeight.of(value) for key, value in state.items()}


def half(vae, name):
    """A file that holds one half, as the makers write it: the decoder's clamp is layer 0."""
    prefix, first = f"{name}.layers.", int(name == "decoder")
    found = {}
    for key, value in vae.state_dict().items():
        if key.startswith(prefix):
            number, rest = key[len(prefix) :].split(".", 1)
            found[f"{int(number) + first}.{rest}"] = value
    return found


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_both_ways_equal_diffusers(name, oracle):
    reference = tiny(oracle, **CASES[name])
    state = reference.state_dict()
    whole = build("taesd", packed(state), reference.config)
    encoder, decoder = (build("taesd", packed(half(reference, one)), {}) for one in CASES_HALVES)
    factor = 2 ** (len(reference.config.num_encoder_blocks) - 1)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 5 * factor, 3 * factor, generator=generator).tanh()
    z = 4 * torch.randn(2, reference.config.latent_channels, 5, 3, generator=generator)
    with torch.no_grad():
        made, shown = reference.encode(pixels).latents, reference.decode(z).sample
        for model in (whole, encoder):
            mean, logvar = model.encode(pixels)
            oracle.assert_close(mean, made)
            assert float((0.5 * logvar).exp().max()) < 1e-6
        for model in (whole, decoder):
            assert (model.config.latents, model.config.factor) == (z.shape[1], factor)
            oracle.assert_close(model.decode(model.unscale(z)), shown)
    assert torch.equal(whole.scale(z), z)


CASES_HALVES = ("encoder", "decoder")


@pytest.mark.oracle
def test_halves_that_disagree_are_refused(oracle):
    state = tiny(oracle).state_dict()
    other = tiny(oracle, latent_channels=16).state_dict()
    state |= {key: value for key, value in other.items() if key.startswith("decoder.")}
    with pytest.raises(ArchitectureError, match=r"channels \[4\] and \[16\]"):
        build("taesd", packed(state), {})


def test_only_the_config_of_a_tiny_autoencoder_is_heard():
    shapes = {"1.weight": (8, 4, 3, 3), "1.bias": (8,), "4.weight": (3, 8, 3, 3), "4.bias": (3,)}
    assert config_from(shapes, {"scaling_factor": 0.18215, "act_fn": "silu"}).factor == 2
    with pytest.raises(ArchitectureError, match=r"scaling_factor is 0\.5"):
        config_from(shapes, {"_class_name": "AutoencoderTiny", "scaling_factor": 0.5})


def test_keys_without_numbers_are_refused():
    with pytest.raises(MissingKeys, match="no numbered layers below 'the top'"):
        config_from({"conv_in.weight": (8, 3, 3, 3)}, {})


def opened(path):
    with open_source(path) as source:
        logical = bind(source)
        part = detect_component(logical.specs())
        return build(model_for(part.kind), packed_weights(logical, part), {})


def psnr_db(a, b):
    return float(-10 * torch.log10(((a.clamp(0, 1) - b) ** 2).mean()))


def int8(kernel):
    scale = kernel.flatten(1).abs().amax(1, keepdim=True) / 127
    rows = (kernel.flatten(1) / scale).round().to(torch.int8)
    return "int8_rowwise", {"weight": rows, "scale": scale}


def fp8(kernel):
    scale = kernel.flatten(1).abs().amax(1, keepdim=True) / 448
    rows = (kernel.flatten(1) / scale).to(torch.float8_e4m3fn)
    return "fp8_e4m3_rowwise", {"weight": rows, "scale": scale}


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("encode", "halves", "loss_db"),
    [(fp8, (0, 1), 0.3), (int8, (0,), 0.3), (int8, (1,), 0.3), (int8, (0, 1), 0.5)],
)
def test_convolutions_of_8_bits_show_the_photograph_nearly_as_well(encode, halves, loss_db):
    """All but the first and last of each half, which touch pixels or latents."""
    recorded = REAL / "taef2_real_roundtrip.safetensors"
    if not recorded.is_file():
        pytest.skip("no real weights here")
    picture = pytest.importorskip("safetensors.torch").load_file(recorded)["image"]
    models = [opened(REAL / f"taef2_{one}.pth") for one in CASES_HALVES]
    packed_layers = 0
    for model in (models[index] for index in halves):
        for layer in model.modules():
            if not isinstance(layer, PackedLayer) or {3, 32} & set(layer.logical_shape[:2]):
                continue
            kernel = layer.weight(torch.float32)
            fmt, parts = encode(kernel)
            layer.bind(PackedWeight((Segment(fmt, tuple(kernel.shape), parts),)))
            packed_layers += 1
    assert packed_layers == 39 * len(halves)
    encoder, decoder = models
    with torch.no_grad():
        seen = decoder.decode(encoder.encode(picture * 2 - 1)[0]) / 2 + 0.5
    assert psnr_db(seen, picture) > 37.53 - loss_db


@pytest.mark.oracle
def test_round_trip_of_a_photograph_through_real_weights_is_the_recorded_one():
    recorded = REAL / "taef2_real_roundtrip.safetensors"
    if not recorded.is_file():
        pytest.skip("no real weights here")
    tensors = pytest.importorskip("safetensors.torch").load_file(recorded)
    encoder, decoder = opened(REAL / "taef2_encoder.pth"), opened(REAL / "taef2_decoder.pth")
    picture = tensors["image"]
    with torch.no_grad():
        z, _ = encoder.encode(picture * 2 - 1)
        seen = decoder.decode(decoder.unscale(encoder.scale(z))) / 2 + 0.5
    assert z.shape == (1, 128, 16, 16)
    unfolded = torch.nn.functional.pixel_shuffle(z, 2)
    assert float((unfolded - tensors["latent"]).abs().max()) < 5e-4
    assert float((seen.clamp(0, 1) - tensors["recon"]).abs().max()) < 5e-4
    assert psnr_db(seen, picture) == pytest.approx(37.53, abs=0.01)
