"""latents(): which files share a latent space, and what is said where a header cannot tell."""

import json
import lzma
from pathlib import Path

import pytest

from diffquant.core.report import to_json
from diffquant.core.tensors import TensorSpec
from diffquant.inspect.latents import latents
from diffquant.inspect.subject import subject_of

DATA = Path(__file__).parents[1] / "data" / "manifests.json.xz"
MANIFESTS = json.loads(lzma.decompress(DATA.read_bytes()))


class Header:
    """A source of which nothing can be read."""

    container, path, metadata = "safetensors", Path("header"), {}

    def __init__(self, shapes, configs):
        self.specs = {key: TensorSpec(key, "BF16", tuple(shape)) for key, shape in shapes.items()}
        self.configs = configs


def subject(name, config=None):
    shapes = MANIFESTS.get(name, {"a.weight": [4, 4]})
    configs = {"config.json": config} if config else {}
    return subject_of(Header(shapes, configs), name)


SD, SDXL = "sd15.unet.ldm", "sdxl-base.checkpoint.ldm"
REFINER, FLUX = "sdxl-refiner.unet.ldm", "flux-dev.transformer.original"

PAIRS = [
    (SDXL, REFINER, "same"),
    (FLUX, "z-image.transformer.comfy", "same"),
    (FLUX, "chroma.transformer.original", "same"),
    (SD, "sd21.unet.ldm", "same"),
    ("qwen-image.transformer.comfy", "wan21-t2v-14b.transformer.original", "same"),
    ("qwen-image.transformer.comfy", "qwen-image.vae.diffusers", "same"),
    (SD, SDXL, "different"),
    (SDXL, FLUX, "different"),
    (FLUX, "sd3-medium.transformer.original", "different"),
    (FLUX, "flux2-dev.transformer.original", "different"),
    (FLUX, "qwen-image.transformer.comfy", "different"),
    (FLUX, "sd.vae-kl-f8.ldm", "different"),
    (SDXL, "sd.vae-kl-f8.ldm", "cannot tell"),
    (FLUX, "flux.vae.original", "cannot tell"),
    (SD, "taesd.decoder.original", "cannot tell"),
    (FLUX, "t5-xxl-encoder.hf", "wanted"),
    ("clip-l.hf", SDXL, "wanted"),
    (SDXL, "t5-xxl-encoder.hf", "not wanted"),
    ("openclip-h.open_clip", SDXL, "not wanted"),
    ("qwen3-4b.hf", "z-image.transformer.comfy", "wanted"),
    (SDXL, "lora.sdxl-kohya-r16", "not comparable"),
    ("unknown", FLUX, "not comparable"),
]


@pytest.mark.parametrize(("first", "second", "verdict"), PAIRS)
def test_verdicts_of_pairs(first, second, verdict):
    report = latents(subject(first), subject(second))
    assert report.verdict == verdict
    assert report.reasons
    assert latents(subject(second), subject(first)).verdict == verdict
    json.dumps(to_json(report))


@pytest.mark.parametrize(
    ("scale", "shift", "model", "verdict"),
    [
        (0.13025, None, SDXL, "same"),
        (0.18215, None, SDXL, "different"),
        (0.18215, None, SD, "same"),
        (0.13025, None, SD, "different"),
    ],
)
def test_a_config_tells_autoencoders_of_four_channels_apart(scale, shift, model, verdict):
    vae = subject("sd.vae-kl-f8.diffusers", {"scaling_factor": scale, "shift_factor": shift})
    assert latents(vae, subject(model)).verdict == verdict


def test_a_config_tells_autoencoders_of_sixteen_channels_apart():
    found = {}
    for scale, shift in ((0.3611, 0.1159), (1.5305, 0.0609)):
        vae = subject("flux.vae.diffusers", {"scaling_factor": scale, "shift_factor": shift})
        found[scale] = [
            latents(vae, subject(model)).verdict
            for model in (FLUX, "sd3-medium.transformer.original")
        ]
    assert found == {0.3611: ["same", "different"], 1.5305: ["different", "same"]}


def test_a_config_that_is_nobodys_tells_nothing():
    vae = subject("flux.vae.diffusers", {"scaling_factor": 0.3611, "shift_factor": 0.5})
    assert latents(vae, subject(FLUX)).verdict == "cannot tell"


def test_different_channels_are_the_reason_and_pixels_the_way():
    report = latents(subject(SDXL), subject(FLUX))
    assert "4 latent channels against 16" in report.reasons
    assert "decode" in report.instead
    assert "encode" in report.instead


def test_equal_channels_of_different_encoders_are_told():
    report = latents(subject(SD), subject(SDXL))
    assert any("another encoder" in reason for reason in report.reasons)


def test_a_foreign_autoencoder_names_the_right_one():
    report = latents(subject(FLUX), subject("sd.vae-kl-f8.ldm"))
    assert report.instead == "use an autoencoder of Flux.1"


def test_a_model_on_pixels_has_no_latents_to_share():
    report = latents(subject("hidream-i1.transformer.original"), subject(FLUX))
    assert report.verdict == "same"
    more = json.loads(lzma.decompress(DATA.with_name("more_manifests.json.xz").read_bytes()))
    pixels = subject_of(Header(more["chroma-radiance.transformer.original"], {}), "radiance")
    report = latents(pixels, subject(FLUX))
    assert report.verdict == "cannot tell"
    assert "pixels" in report.reasons[0]
