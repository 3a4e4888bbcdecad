"""A text encoder or VAE in a file of its own is judged against the model it was taken from."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.quant.types import type_named
from diffquant.runtime.compare import ImageSettings
from diffquant.runtime.compare_files import compare_files
from diffquant.runtime.compare_settings import CompareSettings
from diffquant.runtime.scorers import DEMO_PROMPTS
from diffquant.runtime.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples"
FLUX, SD15 = EXAMPLES / "flux1-shapes", EXAMPLES / "sd15-shapes"
SETTINGS = ImageSettings(DEMO_PROMPTS[1:2], (5,), 2, size=(64, 64))
MADE = {
    "text_encoder": ("q8_0", ".gguf"),
    "text_encoder_2": ("q8_0", ".gguf"),  # T5: text_encoder_3 of other models
    "vae": ("f16", ".safetensors"),
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    found = {}
    for part, (kind, suffix) in MADE.items():
        container = "gguf" if suffix == ".gguf" else "safetensors"
        found[part] = folder / f"{part}{suffix}"
        request = Request(container, type=type_named(kind), parts=(part,))
        run_job(FLUX, found[part], request, verify="none")
    return found


@pytest.mark.parametrize("part", MADE)
def test_a_part_alone_passes_against_its_model(parts, part):
    report = verify(parts[part], FLUX, settings=SETTINGS)
    assert report.load.verdict == "pass", report.load.problems
    assert report.tensors.verdict in ("pass", "warn")
    assert report.image.verdict == "pass", report.image.problems
    assert report.image.psnr_db > 30
    assert report.image.control_psnr_db < 25  # the part itself was damaged


def test_a_damaged_part_fails(parts, tmp_path):
    tensors = load_file(parts["vae"])
    key = max(tensors, key=lambda name: tensors[name].size)
    tensors[key] = np.zeros_like(tensors[key])
    broken = tmp_path / "vae.safetensors"
    save_file(tensors, broken)
    report = verify(broken, FLUX, level="tensors")
    assert (report.load.verdict, report.tensors.verdict) == ("pass", "fail")


def test_a_part_of_another_model_fails_at_load_in_one_line(parts):
    report = verify(parts["text_encoder_2"], SD15, level="load")
    (told,) = report.load.problems
    assert told.startswith("a t5_encoder alone, the source has none: it has denoiser (")
    problems = verify(parts["text_encoder"], SD15, level="load").load.problems
    assert problems
    assert all(one.startswith(("text_encoder: ", "clip_text: ")) for one in problems)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ImageSettings(synthetic=True), "--synthetic does not go with it"),
        (ImageSettings(engine="diffusers"), "--engine diffusers does not go with it"),
        (ImageSettings(compute="int8"), "--compute int8 does not go with it"),
        (ImageSettings(loras=((Path("x"), 1.0),)), "--lora does not go with it"),
    ],
)
def test_what_a_part_alone_does_not_take_is_refused(parts, settings, message):
    with pytest.raises(UsageError, match=f"is a text_encoder_2 alone: {message}"):
        verify(parts["text_encoder_2"], FLUX, settings=settings)


def test_compare_names_the_option_for_it(parts):
    settings = CompareSettings(DEMO_PROMPTS[1:2], (5,), 2, size=(64, 64))
    with pytest.raises(ArchitectureError, match="--only text_encoder_2 compares that alone"):
        compare_files(FLUX, [parts["text_encoder_2"]], settings)
