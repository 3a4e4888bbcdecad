"""Tiny autoencoders against diffusers' AutoencoderTiny, and against a recorded round trip."""

from pathlib import Path

import pytest
import torch

from diffquant.convert.binding import bind
from diffquant.convert.detect import detect_component
from diffquant.convert.jobs import run_job
from diffquant.convert.request import Request
from diffquant.core.errors import ArchitectureError, MissingKeys
from diffquant.io import open_source
from diffquant.quant.types import type_named
from diffquant.runtime.layers import PackedLayer, PackedWeight
from diffquant.runtime.loading import build, model_for
from diffquant.runtime.models.taesd import config_from
from diffquant.runtime.packing import packed_weights
from diffquant.runtime.verify import verify

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


@pytest.fixture(scope="module")
def photograph():
    """The recorded picture, (1, 3, 256, 256) in [0, 1]."""
    recorded = REAL / "taef2_real_roundtrip.safetensors"
    if not recorded.is_file():
        pytest.skip("no real weights here")
    return pytest.importorskip("safetensors.torch").load_file(recorded)["image"]


OUTSIDE = {
    "encoder": ["0.weight", "2.weight", "6.weight", "10.weight", "14.weight"],
    "decoder": ["1.weight", "7.weight", "12.weight", "17.weight", "19.weight"],
}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["fp8_e4m3_rowwise", "fp8_scaled", "int8_rowwise"])
def test_quantized_files_show_the_photograph_nearly_as_well(kind, photograph, tmp_path):
    models = []
    for name in CASES_HALVES:
        source, out = REAL / f"taef2_{name}.pth", tmp_path / f"{name}.safetensors"
        request = Request("safetensors", type=type_named(kind))
        report = run_job(source, out, request, verify="none")
        assert report.target == "diffquant"
        rows = [row for row in report.tensors if "residual blocks" in row.reason]
        assert [row.key for row in rows] == OUTSIDE[name]
        models.append(opened(out))
        packed = [one for one in models[-1].modules() if isinstance(one, PackedLayer)]
        formats = [one.packed.formats for one in packed]
        assert sum(found == (type_named(kind).base,) for found in formats) == 36
        judged = verify(out, source, level="tensors")
        assert judged.load.weights == 79
        assert judged.verdict in ("pass", "warn")
    encoder, decoder = models
    with torch.no_grad():
        seen = decoder.decode(encoder.encode(photograph * 2 - 1)[0]) / 2 + 0.5
    assert psnr_db(seen, photograph) > 37.53 - 0.3


@pytest.mark.oracle
def test_round_trip_of_a_photograph_through_real_weights_is_the_recorded_one(photograph):
    tensors = pytest.importorskip("safetensors.torch").load_file(
        REAL / "taef2_real_roundtrip.safetensors"
    )
    encoder, decoder = opened(REAL / "taef2_encoder.pth"), opened(REAL / "taef2_decoder.pth")
    with torch.no_grad():
        z, _ = encoder.encode(photograph * 2 - 1)
        seen = decoder.decode(decoder.unscale(encoder.scale(z))) / 2 + 0.5
    assert z.shape == (1, 128, 16, 16)
    unfolded = torch.nn.functional.pixel_shuffle(z, 2)
    # recorded on another machine: convolutions add up in another order there
    assert float((unfolded - tensors["latent"]).abs().max()) < 1e-3
    assert float((seen.clamp(0, 1) - tensors["recon"]).abs().max()) < 1e-3
    assert psnr_db(seen, photograph) == pytest.approx(37.53, abs=0.01)
