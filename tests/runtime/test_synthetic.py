"""Denoisers alone: random text of the right shapes, latents as colours, and what is said of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import UsageError
from diffquant.quant.types import type_named
from diffquant.runtime.compare import ImageSettings
from diffquant.runtime.compare_files import compare_files
from diffquant.runtime.compare_settings import CompareSettings
from diffquant.runtime.engines import EngineFiles, open_side
from diffquant.runtime.families import FAMILIES
from diffquant.runtime.latent_colours import COLOURS
from diffquant.runtime.providers import missing_parts
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.synthetic import _ROWS, LatentPreview
from diffquant.runtime.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples"
FLUX = EXAMPLES / "flux1-shapes"
SETTINGS = ImageSettings(("a", "b"), (0,), 3, size=(128, 128), min_psnr=22)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """flux1-shapes' transformer in a file of its own, and the same as q4_0."""
    folder = tmp_path_factory.mktemp("alone")
    source, packed = folder / "flux.safetensors", folder / "flux-q4_0.gguf"
    shutil.copy(FLUX / "transformer" / "diffusion_pytorch_model.safetensors", source)
    run_job(source, packed, Request("gguf", type=type_named("q4_0")))
    return source, packed


def test_every_family_states_what_its_denoiser_asks_for():
    assert _ROWS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux1", "qwen-image"])
def test_the_same_noise_goes_into_every_file_and_prompts_and_seeds_count(name):
    folder = EXAMPLES / f"{name}-shapes"
    side = open_side("bundled", EngineFiles(folder, synthetic=True))
    request = PictureRequest("a", seed=1, steps=2, width=64, height=64)
    one, again, other, seed = (
        side.draw(replace(request, **change))[0]
        for change in ({}, {}, {"prompt": "b"}, {"seed": 2})
    )
    assert one.shape == (8, 8, 3)
    assert np.isfinite(one).all()
    assert (one == again).all()
    assert (one != other).any()
    assert (one != seed).any()
    assert "Gaussian numbers seeded by the prompt's CRC-32" in side.how


def test_a_preview_is_the_published_colours_of_its_space():
    row = COLOURS["flux1"]
    preview = LatentPreview("flux1", 16, 8)
    z = torch.randn(2, 16, 3, 4, generator=torch.Generator().manual_seed(0))
    found = preview.decode(z)
    assert found.shape == (2, 3, 3, 4)
    wanted = z[1, :, 2, 3] @ torch.tensor(row.factors) + torch.tensor(row.bias)
    assert torch.allclose(found[1, :, 2, 3], wanted, atol=1e-6)
    unknown = LatentPreview("flux2", 128, 16)
    assert not unknown.published
    assert torch.equal(unknown.factors, LatentPreview("", 128, 16).factors)


def test_what_is_nowhere_is_named(alone):
    source, _ = alone
    assert missing_parts(source) == ("vae", "text_encoder", "text_encoder_2")
    assert missing_parts(source, base=FLUX) == ()
    assert missing_parts(FLUX) == ()


def test_a_denoiser_alone_is_verified_with_a_warning_with_floor_and_control(alone):
    source, packed = alone
    report = verify(packed, source, settings=SETTINGS)
    assert report.verdict == "pass", report.image.problems
    assert report.image.synthetic
    assert "has no vae, text_encoder, text_encoder_2" in report.warnings[0]
    assert report.image.control_psnr_db < 22 < report.image.psnr_db
    assert report.image.noise_floor_psnr_db > report.image.psnr_db
    assert "synthetic: 32 x" in report.image.how
    with_base = verify(packed, source, settings=replace(SETTINGS, size=(64, 64)), base=FLUX)
    assert not with_base.image.synthetic
    assert not with_base.warnings


def test_a_denoiser_that_is_further_off_than_the_gate_fails(alone):
    source, packed = alone
    report = verify(packed, source, settings=replace(SETTINGS, min_psnr=70))
    assert report.image.verdict == "fail"


def test_comparisons_say_what_stood_for_text_and_pictures(alone):
    source, packed = alone
    settings = CompareSettings(("a",), (0,), 2, size=(128, 128), metrics=("psnr", "flip"))
    comparison, pictures = compare_files(source, [packed], settings)
    assert "synthetic: 32 x" in comparison.synthetic
    assert "denoisers are compared alone" in comparison.warnings[0]
    assert pictures.reference[0].shape == (16, 16, 3)
    assert comparison.candidates[0].values["psnr"].mean > 20
    with pytest.raises(UsageError, match="it compares denoisers"):
        compare_files(source, [packed], replace(settings, synthetic=True, only="vae"))


def test_a_part_is_not_compared_where_the_reference_draws_no_pictures(tmp_path, monkeypatch):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        request = Request("safetensors", dtype="f16", parts=("denoiser", "vae"))
        run_job(EXAMPLES / "sd15-shapes", path, request)
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "forgotten"))  # where the source was
    settings = CompareSettings(("a",), (0,), 2, size=(64, 64), metrics=("psnr",), only="vae")
    with pytest.raises(UsageError, match="takes a reference that draws pictures"):
        compare_files(paths[0], paths[1:], settings)


def test_other_engines_draw_no_synthetic_pictures():
    pytest.importorskip("diffusers")
    with pytest.raises(UsageError, match="draws no synthetic pictures"):
        open_side("diffusers", EngineFiles(FLUX, synthetic=True))
