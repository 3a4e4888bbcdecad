"""Previews: colours by table and measured, tiny autoencoders; what overflows in a low dtype."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffquant.convert.architectures.spaces import SPACES
from diffquant.core.errors import UnknownFormat, UsageError, VerificationError
from diffquant.runtime import precision
from diffquant.runtime.latent_colours import COLOURS
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.preview import measured, published, shower, tiny_decoder, to_colours
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.scorers import DEMO_PROMPTS

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_table_has_a_row_per_channel():
    for name, row in COLOURS.items():
        assert len(row.factors) == SPACES[name].channels
        assert np.abs(row.factors).max() < 1


def test_colours_are_pictures_whatever_the_latents_are():
    latents = torch.randn(2, 4, 3, 5) * 10
    latents[0, 0, 0, 0] = float("nan")
    picture = to_colours(latents, COLOURS["sd"])
    assert picture.shape == (3, 5, 3)
    assert np.isfinite(picture).all()
    assert picture.min() >= 0
    assert picture.max() <= 1
    grey = to_colours(torch.zeros(1, 4, 1, 1), COLOURS["sd"])
    assert np.allclose(grey, 0.5)
    red = torch.tensor([1.0, 0, 0, 0]).reshape(1, 4, 1, 1)
    assert np.allclose(
        to_colours(red, COLOURS["sd"])[0, 0], 0.5 + np.array(COLOURS["sd"].factors[0]) / 2
    )


@pytest.mark.parametrize("name", ["sd15-shapes", "sdxl-shapes"])
def test_a_preview_resembles_the_picture(name):
    opened = open_pipeline(EXAMPLES / name)
    vae = opened.pipeline.parts.vae
    assert published(opened.architecture, vae) is None  # the demo's VAE is no published one
    made = opened.pipeline.generate(DEMO_PROMPTS[0], steps=12, width=128, height=128, cfg=3.0)
    shown = shower(opened.architecture, vae, None)(made.latents)
    small = torch.nn.functional.avg_pool2d(made.images.permute(0, 3, 1, 2), vae.config.factor)
    wanted = small[0].permute(1, 2, 0).numpy()
    assert shown.shape == wanted.shape
    assert np.corrcoef(shown.ravel(), wanted.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_early_previews_are_of_the_picture_and_not_of_its_noise(sampler):
    opened = open_pipeline(EXAMPLES / "sd15-shapes")
    pipeline, seen, noisy = opened.pipeline, [], []
    hook = pipeline.parts.denoiser.register_forward_pre_hook(
        lambda _, args: noisy.append(args[0][:1].float())
    )
    try:
        made = pipeline.generate(
            DEMO_PROMPTS[0], steps=8, width=128, height=128, cfg=3.0, sampler=sampler,
            on_latents=lambda i, n, x: seen.append(x),
        )  # fmt: skip
    finally:
        hook.remove()

    def distance(latents):
        return float((latents - made.latents).pow(2).mean())

    at = len(seen) // 4
    assert distance(seen[at]) < 0.5 * distance(noisy[at + 1])
    assert distance(seen[-1]) < 0.5 * distance(seen[0])


class Linear:
    """A VAE whose latents are colours by known factors."""

    def __init__(self, row):
        self.matrix = torch.linalg.pinv(torch.tensor(row.factors))
        self.bias = torch.tensor(row.bias)
        self.config = type("Config", (), {"latents": len(row.factors), "factor": 8})

    def parameters(self):
        return iter((self.matrix,))

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels, 8).permute(0, 2, 3, 1)
        return ((small - self.bias) @ self.matrix).permute(0, 3, 1, 2), None

    def scale(self, z):
        return z


def test_a_vae_of_the_published_kind_takes_the_table_and_is_measured_right():
    vae = Linear(COLOURS["sdxl"])
    assert published("sdxl", vae) is COLOURS["sdxl"]
    pixels = torch.rand(1, 3, 16, 16).repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
    latents = vae.encode(pixels)[0]
    found = to_colours(latents, measured(vae))
    wanted = torch.nn.functional.avg_pool2d(pixels, 8)[0].permute(1, 2, 0) / 2 + 0.5
    assert np.abs(found - wanted.numpy()).max() < 1e-2


@pytest.fixture
def tiny(oracle, tmp_path):
    """A tiny autoencoder with random weights, saved by diffusers and as its makers save it."""
    model = oracle.diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    state = model.decoder.state_dict()
    plain = {}
    for key, value in state.items():
        _, number, rest = key.split(".", 2)
        plain[f"{int(number) + 1}.{rest}"] = value.contiguous()
    save_file(plain, tmp_path / "taesd_decoder.safetensors")
    return model, tmp_path


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.safetensors", "taesd_decoder.safetensors"]
)
def test_tiny_autoencoders_decode_as_diffusers_does(tiny, name):
    model, folder = tiny
    latents = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0)) * 3
    with torch.no_grad():
        wanted = model.decode(latents).sample / 2 + 0.5
        found = tiny_decoder(folder / name, 4)(latents)
    assert float((found - wanted).abs().max()) < 1e-5


@pytest.mark.oracle
def test_a_file_that_decodes_other_latents_is_refused(tiny):
    _, folder = tiny
    with pytest.raises(UsageError, match="expected a decoder of 16 channels, it decodes 4"):
        tiny_decoder(folder / "taesd_decoder.safetensors", 16)
    vae = EXAMPLES / "sd15-shapes" / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UsageError, match="expected a tiny autoencoder, found a vae"):
        tiny_decoder(vae, 4)


def finite(pipeline, **fields):
    said = []
    request = PictureRequest(DEMO_PROMPTS[0], steps=2, width=64, height=64, cfg=1.0, **fields)
    hooks = precision.Hooks(warn=said.append)
    found = precision.denoise_finite(pipeline, request, hooks=hooks)
    made = precision.decode_finite(pipeline, request, found.latents, hooks)
    return made, said


def test_a_vae_that_overflows_decodes_again_in_float32():
    opened = open_pipeline(EXAMPLES / "sd15-shapes")
    plain, said = finite(opened.pipeline)
    assert said == []
    vae = opened.pipeline.parts.vae.to(torch.bfloat16)
    decode = type(vae).decode

    def overflow(z):
        found = decode(vae, z)
        return found * torch.tensor(float("nan")) if z.dtype == torch.bfloat16 else found

    vae.decode = overflow
    made, said = finite(opened.pipeline)
    assert said == ["the VAE overflowed in bfloat16, the picture was decoded again in float32"]
    assert torch.isfinite(made).all()
    assert float((made - plain).abs().max()) < 0.05
    assert precision.param_dtype(vae) == torch.bfloat16
    vae.decode = lambda z: decode(vae, z) * float("nan")
    with pytest.raises(VerificationError, match="not finite, in float32 either"):
        finite(opened.pipeline)


def test_float16_overflows_for_real_and_is_caught():
    opened = open_pipeline(EXAMPLES / "sd15-shapes")
    vae = opened.pipeline.parts.vae.to(torch.float16)
    norm = next(
        one for name, one in vae.named_parameters() if "decoder" in name and "norm1.w" in name
    )
    norm.data.mul_(3e4)  # activations beyond 65504, and not beyond float32's end
    made, said = finite(opened.pipeline)
    assert said == ["the VAE overflowed in float16, the picture was decoded again in float32"]
    assert torch.isfinite(made).all()


def test_a_denoiser_that_overflows_runs_again_in_float32():
    opened = open_pipeline(EXAMPLES / "sd15-shapes")
    unet = opened.pipeline.parts.denoiser.to(torch.bfloat16)
    forward = type(unet).forward
    unet.forward = lambda x, *rest: (
        forward(unet, x, *rest) * (float("nan") if x.dtype == torch.bfloat16 else 1.0)
    )
    made, said = finite(opened.pipeline)
    assert torch.isfinite(made).all()
    (sentence,) = said
    assert "latents are not finite after step 1" in sentence
    assert "the denoiser overflowed in bfloat16, run again in float32" in sentence
    unet.to(torch.float32).forward = lambda x, *rest: forward(unet, x, *rest) * float("nan")
    with pytest.raises(VerificationError, match="latents are not finite"):
        finite(opened.pipeline)


def test_a_picture_of_the_night_is_left_alone():
    opened = open_pipeline(EXAMPLES / "sd15-shapes")
    vae = opened.pipeline.parts.vae.to(torch.bfloat16)
    vae.decode = lambda z: torch.full((1, 3, 64, 64), -1.0)
    _, said = finite(opened.pipeline)
    assert said == []


def test_dtypes_are_chosen_by_the_device(monkeypatch):
    for native in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(precision, "native_dtype", lambda _device, native=native: native)
        assert f"torch.{precision.chosen_dtype('auto', 'cpu')}" == str(native)
        assert precision.chosen_dtype("float16", "cpu") == "float16"
    with pytest.raises(UnknownFormat, match="unknown dtype 'float8'"):
        precision.chosen_dtype("float8", "cpu")
    assert "extremely slow" in next(precision.slow_here("float16", "cpu"))
    assert list(precision.slow_here("float16", "cuda")) == []
    assert list(precision.slow_here("bfloat16", "cpu")) == []
