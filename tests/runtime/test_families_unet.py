"""SD2, SDXL and its refiner as whole folders and single files, against diffusers' pipelines.

Random tiny models, saved by diffusers, opened from the path as a user would; the single file is
written by our converter, so that OpenCLIP's fused attention is bound from there too.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.families import Conditions, TextOptions
from diffquant.runtime.job import Job, _clues
from diffquant.runtime.opening import open_pipeline

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

PROMPT, NEGATIVE = "a cat, 35mm!", "blurry"
SIZE = {"width": 64, "height": 48}
EULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
DOWN, UP = "DownBlock2D", "UpBlock2D"
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The toy CLIP tokenizer of test_tokenizers.py, 77 positions."""
    path = Path(__file__).with_name("test_tokenizers.py")
    spec = importlib.util.spec_from_file_location("toy_tokenizers_for_unets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    names = {"bos_token": module.SPECIAL[0], "unk_token": module.SPECIAL[1]}
    return folder, len(module.toy_clip(folder, model_max_length=77, **names))


def text_encoder(oracle, words, width, seed, *, layers=3, projection=None, act="gelu"):
    tf = oracle.transformers
    config = tf.CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_act=act,
        projection_dim=projection or width,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
    )
    kind = tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel
    return oracle.randomize(kind(config), seed=seed)


def vae(oracle, scale):
    model = oracle.diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=scale,
    )
    return oracle.randomize(model, seed=2)


def unet(oracle, widths, seed, **config):
    base = {"layers_per_block": 1, "use_linear_projection": True, "norm_num_groups": 16}
    model = oracle.diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=widths, **base, **config
    )
    return oracle.randomize(model, seed=seed)


def added(width, numbers, pooled):
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": width,
        "projection_class_embeddings_input_dim": numbers * width + pooled,
    }


def sd2(oracle, words):
    denoiser = unet(
        oracle,
        (32, 64),
        seed=4,
        cross_attention_dim=1024,  # what tells SD2 from its neighbours
        attention_head_dim=(2, 4),
        down_block_types=(CROSS[0], DOWN),
        up_block_types=(UP, CROSS[1]),
    )
    return oracle.diffusers.StableDiffusionPipeline(
        vae=vae(oracle, 0.18215),
        text_encoder=text_encoder(oracle, words[1], 1024, 5),
        tokenizer=oracle.transformers.CLIPTokenizer.from_pretrained(words[0]),
        unet=denoiser,
        scheduler=oracle.diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(oracle, words, zeros=True):
    denoiser = unet(
        oracle,
        (32, 64, 64),
        seed=6,
        cross_attention_dim=96,
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 2, 3),
        down_block_types=(DOWN, *CROSS[:1] * 2),
        up_block_types=(*CROSS[1:] * 2, UP),
        **added(24, 6, 48),
    )
    slow = oracle.transformers.CLIPTokenizer
    return oracle.diffusers.StableDiffusionXLPipeline(
        vae=vae(oracle, 0.13025),
        text_encoder=text_encoder(oracle, words[1], 32, 7, act="quick_gelu"),
        text_encoder_2=text_encoder(oracle, words[1], 64, 8, projection=48),
        tokenizer=slow.from_pretrained(words[0]),
        tokenizer_2=slow.from_pretrained(words[0]),
        unet=denoiser,
        scheduler=oracle.diffusers.EulerDiscreteScheduler(**EULER),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def refiner(oracle, words):
    denoiser = unet(
        oracle,
        (32, 64, 64, 64),
        seed=9,
        cross_attention_dim=64,
        attention_head_dim=(1, 2, 2, 2),
        transformer_layers_per_block=2,
        down_block_types=(DOWN, *CROSS[:1] * 2, DOWN),
        up_block_types=(UP, *CROSS[1:] * 2, UP),
        **added(16, 5, 48),
    )
    return oracle.diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(oracle, 0.13025),
        text_encoder=None,
        text_encoder_2=text_encoder(oracle, words[1], 64, 10, projection=48),
        tokenizer=None,
        tokenizer_2=oracle.transformers.CLIPTokenizer.from_pretrained(words[0]),
        unet=denoiser,
        scheduler=oracle.diffusers.EulerDiscreteScheduler(**EULER),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def lcm(oracle, words):
    """A latent consistency model of SD2's structure: guidance is an input of its own."""
    base = sd2(oracle, words)
    known = base.unet.config.items()
    config = {name: value for name, value in known if not name.startswith("_")}
    config["time_cond_proj_dim"] = 20
    parts = dict(base.components)
    parts.pop("image_encoder", None)
    denoiser = oracle.diffusers.UNet2DConditionModel.from_config(config)
    scheduler = oracle.diffusers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    parts |= {"unet": oracle.randomize(denoiser, seed=9), "scheduler": scheduler}
    return oracle.diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


MAKERS = {"sd2": sd2, "sdxl": sdxl, "sdxl_refiner": refiner}


@pytest.fixture(scope="module")
def saved(oracle, tokenizer, tmp_path_factory):
    """slug -> (diffusers pipeline, folder, single file)."""
    found = {}
    for slug, make in MAKERS.items():
        pipeline = make(oracle, tokenizer)
        pipeline.set_progress_bar_config(disable=True)
        root = tmp_path_factory.mktemp(slug)
        pipeline.save_pretrained(root / "folder")
        single = root / f"{slug}.safetensors"
        run_job(root / "folder", single, Request(container=container_for(single)))
        found[slug] = (pipeline, root / "folder", single)
    return found


def opened(saved, slug, kind):
    _, folder, single = saved[slug]
    return open_pipeline(folder) if kind == "folder" else open_pipeline(single, base=folder)


def begin(slug, pipeline, **options):
    """Latents of diffusers after 4 steps from the noise of seed 7, refined from pure noise."""
    shape = (1, 4, SIZE["height"] // 8, SIZE["width"] // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    common = {"num_inference_steps": 4, "output_type": "latent", **options}
    if slug != "sdxl_refiner":
        return pipeline(PROMPT, latents=noise, **SIZE, **common).images
    # img2img over the whole range: the noise is handed over as latents that are noised already
    pipeline.scheduler.set_timesteps(4)
    handed = noise * pipeline.scheduler.init_noise_sigma
    return pipeline(PROMPT, image=handed, denoising_start=1e-6, **common).images


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("slug", list(MAKERS))
def test_four_guided_steps_end_where_diffusers_ends(oracle, saved, slug, kind):
    wanted = begin(slug, saved[slug][0], guidance_scale=4.0, negative_prompt=NEGATIVE)
    side = opened(saved, slug, kind)
    assert side.architecture == slug
    found = side.pipeline.generate(PROMPT, NEGATIVE, seed=7, steps=4, cfg=4.0, **SIZE)
    oracle.assert_close(found.latents, wanted, 1e-3)


def test_no_negative_prompt_means_zeros_for_sdxl(oracle, saved):
    wanted = begin("sdxl", saved["sdxl"][0], guidance_scale=4.0)
    side = opened(saved, "sdxl", "folder")
    found = side.pipeline.generate(PROMPT, seed=7, steps=4, cfg=4.0, **SIZE)
    oracle.assert_close(found.latents, wanted, 1e-3)
    encoded = side.pipeline.generate(PROMPT, "", seed=7, steps=4, cfg=4.0, **SIZE)
    assert float((encoded.latents - wanted).abs().max()) > 1e-2


def test_a_folder_that_says_so_encodes_the_empty_prompt(oracle, tokenizer, tmp_path):
    pipeline = sdxl(oracle, tokenizer, zeros=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    wanted = begin("sdxl", pipeline, guidance_scale=4.0)
    found = open_pipeline(tmp_path).pipeline.generate(PROMPT, seed=7, steps=4, cfg=4.0, **SIZE)
    oracle.assert_close(found.latents, wanted, 1e-3)


def test_sizes_are_among_the_conditions_of_sdxl(saved):
    side = opened(saved, "sdxl", "folder").pipeline
    call = side.family.caller
    noise = torch.zeros(1, 4, 6, 8)
    text = side.family.encode(side.parts, [PROMPT], TextOptions())
    small, large = (
        call(side.parts, Conditions(size))(noise, 500.0, [text])[0]
        for size in ((64, 48), (1024, 768))
    )
    assert float((small - large).abs().max()) > 1e-3


def test_distilled_guidance_is_refused(saved):
    with pytest.raises(UsageError, match="takes no distilled guidance"):
        opened(saved, "sdxl", "folder").pipeline.generate(PROMPT, steps=1, guidance=3.5, **SIZE)


def test_a_latent_consistency_model_is_guided_through_its_own_input(oracle, tokenizer, tmp_path):
    pipeline = lcm(oracle, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    folder, single = tmp_path / "folder", tmp_path / "file.safetensors"
    pipeline.save_pretrained(folder)
    run_job(folder, single, Request(container=container_for(single)))
    sides = (open_pipeline(folder), open_pipeline(single, base=folder))
    noise = torch.randn((1, 4, 6, 8), generator=torch.Generator().manual_seed(7))
    run = {"num_inference_steps": 1, "output_type": "latent", "latents": noise, **SIZE}
    for strength in (8.0, 2.5):  # one step: the scheduler's own noise comes from the device's seed
        wanted = pipeline(PROMPT, guidance_scale=strength, **run).images
        given = {} if strength == 8.0 else {"guidance": strength}
        for side in sides:
            found = side.pipeline.generate(PROMPT, seed=7, steps=1, **given, **SIZE)
            oracle.assert_close(found.latents, wanted, 1e-3)
            assert side.pipeline.cfg == 1
    clues = _clues(Job(folder, tmp_path / "o.png", {}), side)
    assert clues.time_cond
    assert clues.guided is None


def test_a_vector_of_another_width_is_named(saved):
    side = opened(saved, "sdxl", "folder").pipeline
    text = side.family.encode(side.parts, [PROMPT], TextOptions())
    narrow = text.pooled[:, :-1]
    broken = type(text)(text.states, narrow)
    call = side.family.caller(side.parts, Conditions((64, 48)))
    with pytest.raises(ArchitectureError, match="extra vector has 192 numbers"):
        call(torch.zeros(1, 4, 6, 8), 500.0, [broken])
