"""Qwen-Image as a whole, against diffusers' QwenImagePipeline on the demo checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.families import FAMILIES, Conditions, TextOptions
from diffquant.runtime.models.flux import unpack
from diffquant.runtime.opening import open_pipeline

FOLDER = Path(__file__).parents[2] / "examples" / "qwen-image-shapes"
PROMPT = "a large yellow star on a black background in the center"
NEGATIVE = "a small red circle at the left, {blurry} <|im_end|>"
PROMPTS = {
    "one": [PROMPT],
    "of different lengths": [PROMPT, "", "star\n\n  ü 星", "<|im_start|>{} {0} %s"],
    "too long": ["a " + "very " * 600 + "large star", "short"],
}


@pytest.fixture(scope="module")
def ours():
    return open_pipeline(FOLDER).pipeline


@pytest.fixture(scope="module")
def theirs(oracle):
    pipeline = oracle.diffusers.DiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(pipeline, prompts, **options):
    return FAMILIES["qwen_image"].encode(pipeline.parts, prompts, TextOptions(**options))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("tokens", [None, 1024, 7])
@torch.no_grad()
def test_texts_are_encoded_as_diffusers_does(prompts, tokens, ours, theirs, oracle):
    wanted, mask = theirs.encode_prompt(PROMPTS[prompts], max_sequence_length=tokens or 512)
    found = encode(ours, PROMPTS[prompts], tokens=tokens)
    assert (found.mask is None) == (mask is None)
    if mask is not None:
        assert torch.equal(found.mask, mask.bool())
    oracle.assert_close(found.states, wanted)


def test_what_does_not_fit_is_told_and_what_is_asked_for_must_fit_the_model(ours):
    assert encode(ours, [PROMPT]).truncated == ()
    # Closing words of the template do not count: only what the user wrote is told.
    ids = ours.parts.tokenizers[0].backend.encode(PROMPT, add_special_tokens=False).ids
    before = encode(ours, [PROMPT], tokens=1024).states.shape[1] - len(ids) - 5
    assert encode(ours, [PROMPT], tokens=before + len(ids)).truncated == ()
    assert encode(ours, [PROMPT], tokens=before + len(ids) - 1).truncated == ("qwen: center",)
    for tokens in (-1, 1025):
        with pytest.raises(UsageError, match=f"must be 1 to 1024, found {tokens}"):
            encode(ours, [PROMPT], tokens=tokens)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("prompts", "theirs_options", "ours_options"),
    [
        ([PROMPT], {}, {"cfg": 1.0}),
        ([PROMPT], {"negative_prompt": " "}, {}),
        (
            [PROMPT],
            {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5},
            {"negative": NEGATIVE, "cfg": 2.5},
        ),
        ([PROMPT, "a star"], {"negative_prompt": [" ", " "]}, {}),
    ],
    ids=["no guidance", "guidance by default", "negative prompt", "two prompts"],
)
@pytest.mark.parametrize("size", [(128, 128), (96, 208)], ids=str)
def test_four_steps_give_the_latents_of_diffusers(
    prompts, theirs_options, ours_options, size, ours, theirs, oracle
):
    """Noise, text, dynamic shift with its terminal, guidance, unpacking: all of the loop."""
    width, height = size
    tokens = theirs(
        prompts,
        width=width,
        height=height,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(11 + i) for i in range(len(prompts))],
        output_type="latent",
        **theirs_options,
    ).images
    found = ours.generate(
        prompts, seed=11, steps=4, width=width, height=height, **ours_options
    ).latents
    assert float((found - unpack(tokens, height // 8, width // 8)).abs().max()) < 1e-3


def test_layered_models_and_distilled_guidance_are_refused(ours):
    family, parts = FAMILIES["qwen_image"], ours.parts
    with pytest.raises(UsageError, match="takes no distilled guidance"):
        family.caller(parts, Conditions((128, 128), guidance=3.5))
    layered = open_pipeline(FOLDER).pipeline.parts
    layered.denoiser.config = replace(layered.denoiser.config, layered=True)
    with pytest.raises(ArchitectureError, match="Qwen-Image-Layered takes a picture apart"):
        family.caller(layered, Conditions((128, 128)))


def test_guidance_keeps_the_norm_of_every_token(ours):
    family = FAMILIES["qwen_image"]
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 1, 16, 4, 6, generator=generator)
    found = family.guide(positive, negative, 4.0)
    squares = [
        one.square().sum(1).unflatten(2, (3, 2)).unflatten(1, (2, 2)).sum((2, 4))
        for one in (found, positive)
    ]
    torch.testing.assert_close(*squares)
    assert torch.equal(family.guide(positive, positive, 1.0), positive)
