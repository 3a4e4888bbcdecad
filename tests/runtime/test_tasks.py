"""Image to image, inpainting, refiner and hires against diffusers' pipelines, tiny and random."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffquant.core.errors import DiffquantError, UsageError
from diffquant.runtime.hires import hires, redraw
from diffquant.runtime.img2img import resize
from diffquant.runtime.loading import build
from diffquant.runtime.pipeline import Pipeline, PipelineParts
from diffquant.runtime.refine import refine
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.tokenizers import load_tokenizer

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PROMPT, NEGATIVE = "a cat, 35mm!", "blurry"
WIDTH, HEIGHT = 64, 48
SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
DDIM = ("DDIMScheduler", {**SD_SCHEDULE, "clip_sample": False, "set_alpha_to_one": False})
EULER = ("EulerDiscreteScheduler", {**SD_SCHEDULE, "timestep_spacing": "leading"})


def neighbour(name):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_of_tasks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


base = neighbour("test_pipeline")


def picture(seed=0, count=1):
    made = np.random.default_rng(seed).random((count, HEIGHT, WIDTH, 3), np.float32)
    return torch.from_numpy(made)


def hole():
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[:, 5:29, 18:45] = 1  # no multiples of 8: how pixels become latents is seen
    return mask


def theirs_of(pictures):
    return pictures.permute(0, 3, 1, 2)  # diffusers takes (B, 3, H, W) in [0, 1]


def generators(*seeds):
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def sd_pair(oracle, root, *, channels=4, scheduler=DDIM):
    """(components of diffusers, our pipeline)."""
    folder, vocabulary = base.clip_tokenizer(root / "tokenizer")
    clip = base.tiny_clip(oracle, 32, vocabulary)
    vae = base.tiny_vae(oracle, scaling_factor=0.18215)
    unet = oracle.diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        layers_per_block=1,
    )
    oracle.randomize(unet, seed=3)
    name, config = scheduler
    theirs, facts = base.scheduler_of(oracle, name, **config)
    parts = {
        "vae": vae,
        "text_encoder": clip,
        "tokenizer": oracle.transformers.CLIPTokenizer.from_pretrained(folder),
        "unet": unet,
        "scheduler": theirs,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    ours = PipelineParts(
        architecture="sd15",
        denoiser=build("unet", oracle.unet_weights(unet), unet.config),
        vae=build("vae_kl", oracle.vae_weights(vae), vae.config),
        text_encoders=(build("clip", oracle.clip_weights(clip), clip.config.to_dict()),),
        tokenizers=(load_tokenizer(folder),),
        scheduler=facts,
    )
    return parts, Pipeline(ours)


def quiet(reference):
    reference.set_progress_bar_config(disable=True)
    return reference


@pytest.fixture(scope="module")
def sd(oracle, tmp_path_factory):
    return sd_pair(oracle, tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sd_inpaint(oracle, tmp_path_factory):
    return sd_pair(oracle, tmp_path_factory.mktemp("inpaint"), channels=9)


GUIDED = {"negative_prompt": NEGATIVE, "guidance_scale": 5.0, "num_inference_steps": 4}
OURS = {
    "negative": NEGATIVE,
    "cfg": 5.0,
    "steps": 4,
    "width": WIDTH,
    "height": HEIGHT,
    "paste": False,
}


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_image_to_image_equals_diffusers(strength, sampler, sd, oracle):
    parts, pipeline = sd
    name, config = {"ddim": DDIM, "euler": EULER}[sampler]
    scheduler = getattr(oracle.diffusers, name)(**config)
    reference = quiet(
        oracle.diffusers.StableDiffusionImg2ImgPipeline(**{**parts, "scheduler": scheduler})
    )
    image = picture()
    wanted = reference(
        PROMPT,
        image=theirs_of(image.repeat(2, 1, 1, 1)),
        num_images_per_prompt=2,
        strength=strength,
        generator=generators(5, 6),
        output_type="pt",
        **GUIDED,
    ).images
    leading = {"schedule": "leading"} if sampler == "euler" else {}
    found = pipeline.generate(
        PROMPT, image=image, strength=strength, sampler=sampler, seed=5, batch=2, **OURS, **leading
    )
    oracle.assert_close(found.images, wanted.permute(0, 2, 3, 1), 1e-3)
    assert found.seeds == (5, 6)
    assert found.calls == int(4 * strength)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("model", ["sd", "sd_inpaint"])
def test_inpainting_equals_diffusers(strength, model, request, oracle):
    parts, pipeline = request.getfixturevalue(model)
    reference = quiet(oracle.diffusers.StableDiffusionInpaintPipeline(**parts))
    wanted = reference(
        PROMPT,
        image=theirs_of(picture()),
        mask_image=hole()[:, None],
        strength=strength,
        width=WIDTH,
        height=HEIGHT,
        generator=generators(5),
        output_type="pt",
        **GUIDED,
    ).images
    found = pipeline.generate(
        PROMPT, image=picture(), mask=hole(), strength=strength, seed=5, **OURS
    )
    oracle.assert_close(found.images, wanted.permute(0, 2, 3, 1), 1e-3)


def test_protected_pixels_are_put_back_and_protected_latents_kept(sd):
    pipeline, image = sd[1], picture()
    common = {"image": image, "mask": hole(), "strength": 1.0, **OURS}
    found = pipeline.generate(PROMPT, **{**common, "paste": True})
    outside = hole()[0] == 0
    assert torch.equal(found.images[0][outside], image[0][outside])
    assert not torch.allclose(found.images[0][~outside], image[0][~outside], atol=0.05)
    other = pipeline.generate("a dog", **common)
    kept = torch.nn.functional.interpolate(hole()[:, None], size=found.latents.shape[-2:]) == 0
    kept = kept.expand_as(found.latents)
    assert torch.equal(found.latents[kept], other.latents[kept])
    assert not torch.equal(found.latents, other.latents)


def test_every_sampler_can_inpaint(sd):
    for sampler in ("pndm", "heun", "euler_a", "dpmpp_2m", "unipc"):
        found = sd[1].generate(
            PROMPT, image=picture(), mask=hole(), sampler=sampler, strength=0.8, **OURS
        )
        assert bool(torch.isfinite(found.images).all())


FLOW = {"shift": 3.0, "use_dynamic_shifting": True}


@pytest.fixture(scope="module")
def fill(oracle, tmp_path_factory):
    return base.flux_pair(
        oracle,
        tmp_path_factory.mktemp("fill"),
        guidance=True,
        scheduler=FLOW,
        in_channels=384,
        pipeline="FluxFillPipeline",
    )


@pytest.fixture(scope="module")
def flux(oracle, tmp_path_factory):
    root = tmp_path_factory.mktemp("flux")
    return base.flux_pair(oracle, root, guidance=True, scheduler=FLOW)


FLUX_THEIRS = {"guidance_scale": 2.5, "max_sequence_length": 16, "num_inference_steps": 4}
FLUX_OURS = {
    "guidance": 2.5,
    "text_tokens": 16,
    "steps": 4,
    "width": WIDTH,
    "height": HEIGHT,
    "paste": False,
}


@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("kind", ["FluxFillPipeline", "FluxInpaintPipeline"])
def test_flux_inpainting_equals_diffusers(strength, kind, fill, flux, oracle):
    reference, pipeline = fill if kind == "FluxFillPipeline" else flux
    if kind != "FluxFillPipeline":
        parts = {
            k: v
            for k, v in reference.components.items()
            if "image" not in k and k != "feature_extractor"
        }
        reference = quiet(getattr(oracle.diffusers, kind)(**parts))
    wanted = reference(
        prompt=PROMPT,
        image=theirs_of(picture()),
        mask_image=hole()[:, None],
        strength=strength,
        width=WIDTH,
        height=HEIGHT,
        generator=generators(5),
        output_type="pt",
        **FLUX_THEIRS,
    ).images
    found = pipeline.generate(
        PROMPT, image=picture(), mask=hole(), strength=strength, seed=5, **FLUX_OURS
    )
    oracle.assert_close(found.images, wanted.permute(0, 2, 3, 1), 1e-3)


def test_flux_image_to_image_equals_diffusers(flux, oracle):
    reference, pipeline = flux
    parts = {
        k: v
        for k, v in reference.components.items()
        if "image" not in k and k != "feature_extractor"
    }
    reference = quiet(oracle.diffusers.FluxImg2ImgPipeline(**parts))
    wanted = reference(
        prompt=PROMPT,
        image=theirs_of(picture()),
        strength=0.6,
        width=WIDTH,
        height=HEIGHT,
        generator=generators(5),
        output_type="pt",
        **FLUX_THEIRS,
    ).images
    found = pipeline.generate(PROMPT, image=picture(), strength=0.6, seed=5, **FLUX_OURS)
    oracle.assert_close(found.images, wanted.permute(0, 2, 3, 1), 1e-3)


def sdxl_unet(oracle, *, refiner, channels=4):
    numbers, width = (5, 16) if refiner else (6, 16)
    unet = oracle.diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 if refiner else 64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=width,
        projection_class_embeddings_input_dim=numbers * width + 24,
        layers_per_block=1,
    )
    return oracle.randomize(unet, seed=8 if refiner else 7)


@pytest.fixture(scope="module")
def sdxl(oracle, tmp_path_factory):
    """Components of diffusers and our pipelines: base, refiner, 9-channel base."""
    folder, vocabulary = base.clip_tokenizer(tmp_path_factory.mktemp("sdxl") / "tokenizer")
    first = base.tiny_clip(oracle, 32, vocabulary)
    config = first.config.__class__(
        **{**first.config.to_dict(), "projection_dim": 24, "hidden_act": "gelu"}
    )
    second = oracle.transformers.CLIPTextModelWithProjection(config)
    oracle.randomize(second, seed=9)
    vae = base.tiny_vae(oracle, scaling_factor=0.13025, force_upcast=False)
    tokenizer = oracle.transformers.CLIPTokenizer.from_pretrained(folder)
    name, settings = EULER
    scheduler, facts = base.scheduler_of(oracle, name, **settings)
    shared = {
        "vae": vae,
        "text_encoder_2": second,
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "scheduler": scheduler,
    }
    our_vae = build("vae_kl", oracle.vae_weights(vae), vae.config)
    bare = load_tokenizer(folder)
    encoders = [
        build("clip", oracle.clip_weights(one), one.config.to_dict()) for one in (first, second)
    ]
    made = {}
    for label, refiner, channels in (("base", False, 4), ("refiner", True, 4), ("nine", False, 9)):
        unet = sdxl_unet(oracle, refiner=refiner, channels=channels)
        own = encoders[1:] if refiner else encoders
        ours = PipelineParts(
            architecture="sdxl_refiner" if refiner else "sdxl",
            denoiser=build("unet", oracle.unet_weights(unet), unet.config),
            vae=our_vae,
            text_encoders=tuple(own),
            tokenizers=(bare,) * len(own),
            scheduler=facts,
        )
        theirs = {**shared, "unet": unet, "text_encoder": None if refiner else first}
        if refiner:
            theirs["tokenizer"] = None
        made[label] = (theirs, Pipeline(ours))
    return made


XL = {
    "width": WIDTH,
    "height": HEIGHT,
    "steps": 5,
    "cfg": 4.0,
    "negative": NEGATIVE,
    "paste": False,
}
XL_THEIRS = {"num_inference_steps": 5, "guidance_scale": 4.0, "negative_prompt": NEGATIVE}


def test_base_and_refiner_share_a_run_as_in_diffusers(sdxl, oracle):
    theirs, pipeline = sdxl["base"]
    refiner_parts, refiner = sdxl["refiner"]
    first = quiet(oracle.diffusers.StableDiffusionXLPipeline(**theirs))
    second = quiet(
        oracle.diffusers.StableDiffusionXLImg2ImgPipeline(
            **refiner_parts, requires_aesthetics_score=True
        )
    )
    latents = first(
        PROMPT,
        width=WIDTH,
        height=HEIGHT,
        denoising_end=0.6,
        generator=generators(5),
        output_type="latent",
        **XL_THEIRS,
    ).images
    wanted = second(
        PROMPT, image=latents, denoising_start=0.6, output_type="pt", **XL_THEIRS
    ).images
    request = PictureRequest(PROMPT, seed=5, **XL)
    found = refine(pipeline, refiner, request, switch=0.6)
    oracle.assert_close(found.images, wanted.permute(0, 2, 3, 1), 1e-3)
    assert found.calls == 5
    half = pipeline.denoise(replace(request, end=0.6))
    oracle.assert_close(half.latents, latents, 1e-4)


def test_refiner_draws_a_picture_again_as_in_diffusers(sdxl, oracle):
    theirs, refiner = sdxl["refiner"]
    second = quiet(
        oracle.diffusers.StableDiffusionXLImg2ImgPipeline(**theirs, requires_aesthetics_score=True)
    )
    wanted = second(
        PROMPT,
        image=theirs_of(picture()),
        strength=0.6,
        generator=generators(5),
        output_type="pt",
        **XL_THEIRS,
    ).images
    request = PictureRequest(PROMPT, seed=5, **XL)
    found = redraw(refiner, request, picture(), size=(WIDTH, HEIGHT), strength=0.6, same=True)
    oracle.assert_close(found.images, wanted.permute(0, 2, 3, 1), 1e-3)


@pytest.mark.parametrize("model", ["base", "nine"])
def test_sdxl_inpainting_equals_diffusers(model, sdxl, oracle):
    theirs, pipeline = sdxl[model]
    reference = quiet(oracle.diffusers.StableDiffusionXLInpaintPipeline(**theirs))
    wanted = reference(
        PROMPT,
        image=theirs_of(picture()),
        mask_image=hole()[:, None],
        strength=0.8,
        width=WIDTH,
        height=HEIGHT,
        generator=generators(5),
        output_type="pt",
        **XL_THEIRS,
    ).images
    found = pipeline.generate(PROMPT, image=picture(), mask=hole(), strength=0.8, seed=5, **XL)
    oracle.assert_close(found.images, wanted.permute(0, 2, 3, 1), 1e-3)


@torch.no_grad()
def test_clip_skip_reads_the_layer_before_the_last(sd, oracle):
    size = {"width": WIDTH, "height": HEIGHT}
    reference = quiet(oracle.diffusers.StableDiffusionPipeline(**sd[0]))
    encoder, tokenizer = sd[0]["text_encoder"], sd[0]["tokenizer"]

    def states(text):  # diffusers' clip_skip=1 with transformers 5, which moved the final norm
        ids = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        hidden = encoder(ids, output_hidden_states=True).hidden_states
        return encoder.final_layer_norm(hidden[-2])

    guided = {k: v for k, v in GUIDED.items() if k != "negative_prompt"}
    wanted = reference(
        prompt_embeds=states(PROMPT),
        negative_prompt_embeds=states(NEGATIVE),
        generator=generators(1),
        output_type="pt",
        **size,
        **guided,
    ).images
    found = sd[1].generate(PROMPT, clip_skip=2, seed=1, **OURS)
    oracle.assert_close(found.images, wanted.permute(0, 2, 3, 1), 1e-3)
    with pytest.raises(UsageError, match="clip skip must be 1 to 2, found 3"):
        sd[1].generate(PROMPT, clip_skip=3, **OURS)


def test_hires_equals_its_steps_by_hand_and_crosses_architectures(sd, flux):
    pipeline, other = sd[1], flux[1]
    request = PictureRequest(PROMPT, NEGATIVE, seed=(4, 9), batch=2, steps=3, width=32, height=32)
    found = hires(pipeline, request, factor=1.5, strength=0.7)
    assert found.images.shape == (2, 48, 48, 3)
    first = pipeline.run(request)
    larger = resize(first.images, 48, 48)
    by_hand = pipeline.run(replace(request, image=larger, strength=0.7, width=48, height=48))
    assert torch.equal(found.images, by_hand.images)
    crossed = hires(pipeline, replace(request, text_tokens=None), factor=1.6, second=other)
    assert crossed.images.shape == (2, 48, 48, 3)  # 51.2, brought to a multiple of 16
    assert crossed.sampler == "flow_euler"


def test_resize_is_pillows_lanczos():
    made = resize(picture(), 32, 24)
    flat = resize(torch.full((1, 8, 8, 3), 0.3), 20, 12)
    assert made.shape == (1, 24, 32, 3)
    torch.testing.assert_close(flat, torch.full((1, 12, 20, 3), 0.3))
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


def test_weights_and_long_prompts_act(sd):
    run = {"steps": 2, "width": 32, "height": 32, "cfg": 5.0}
    pipeline = sd[1]
    plain = pipeline.generate("a cat", **run)
    heavy = pipeline.generate("a (cat:1.4)", **run)
    mean = pipeline.generate("a (cat:1.4)", prompt_style="a1111", **run)
    light = pipeline.generate("a (cat:1.0)", **run)
    assert torch.allclose(plain.images, light.images, atol=1e-5)
    assert not torch.allclose(plain.images, heavy.images, atol=1e-4)
    assert not torch.allclose(mean.images, heavy.images, atol=1e-4)
    long = pipeline.generate("cat " * 100, **run)  # two chunks against the negative's one
    assert long.truncated == ()
    cut = pipeline.generate("cat " * 100, prompt_style="plain", **run)
    assert cut.truncated
    both = pipeline.generate(["cat " * 100, "a cat"], seed=[0, 0], **run)
    torch.testing.assert_close(both.images[:1], long.images, atol=1e-4, rtol=0)
    torch.testing.assert_close(both.images[1:], plain.images, atol=1e-4, rtol=0)


def test_steps_and_latents_are_reported(sd):
    steps, latents = [], []
    sd[1].generate(
        PROMPT,
        steps=3,
        width=32,
        height=32,
        sampler="euler",
        on_step=lambda *a: steps.append(a),
        on_latents=lambda i, n, x: latents.append((i, n, tuple(x.shape))),
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert latents == [(i, 3, (1, 4, 4, 4)) for i in range(3)]


def test_guidance_can_end_early_and_saves_calls(sd):
    unet, seen = sd[1].parts.denoiser, []
    handle = unet.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        sd[1].generate(
            PROMPT, steps=4, width=32, height=32, sampler="euler", cfg=5.0, cfg_cutoff=0.5
        )
    finally:
        handle.remove()
    assert seen == [2, 2, 1, 1]


def test_requests_that_cannot_be_met_are_refused(sd, sd_inpaint, flux, sdxl):
    image, mask = picture(), hole()
    pipeline = sd[1]
    cases = [
        ({"mask": mask}, "give the picture too"),
        ({"image": image[:, :8]}, r"must have the shape of what is made.*resize it first"),
        ({"image": image * 2}, "between 0 and 1"),
        ({"image": image * float("nan")}, "between 0 and 1"),
        ({"image": image, "mask": mask * 0}, "leaves nothing to paint"),
        ({"image": image, "strength": 0.0}, "strength must be above 0"),
        ({"image": image, "strength": 0.1}, "no step is left"),
        ({"image": image, "begin": 0.5}, "not both"),
        ({"begin": 0.5}, "needs the latents"),
        ({"seed": -1}, "a seed is between"),
        ({"seed": 2**64 - 1, "batch": 2}, "a seed is between"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"prompt_style": "a111"}, "did you mean 'a1111'"),
        ({"rng": "gpu"}, "source of noise"),
        ({"latents": torch.zeros(1, 4, 2, 2)}, "latents must have shape"),
    ]
    for fields, message in cases:
        with pytest.raises(DiffquantError, match=message):
            pipeline.generate(PROMPT, **{**OURS, **fields})
    with pytest.raises(UsageError, match="give it a picture and a mask"):
        sd_inpaint[1].generate(PROMPT, **OURS)
    with pytest.raises(UsageError, match="clip skip has no effect"):
        flux[1].generate(PROMPT, clip_skip=2, **FLUX_OURS)
    request = PictureRequest(PROMPT, **XL)
    with pytest.raises(UsageError, match="cannot go on from latents of sd15"):
        refine(pipeline, sdxl["refiner"][1], request)
    with pytest.raises(UsageError, match="takes no mask"):
        refine(sdxl["base"][1], sdxl["refiner"][1], replace(request, image=image, mask=mask))
    with pytest.raises(UsageError, match="hires factor must be 1 to 4"):
        hires(pipeline, request, factor=float("nan"))
