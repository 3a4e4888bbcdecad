"""Text to image against diffusers: random tiny pipelines, several sizes, from the same seed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffquant.core.errors import UnknownFormat, UsageError, VerificationError
from diffquant.runtime.loading import build
from diffquant.runtime.noise import NoiseSource
from diffquant.runtime.pipeline import Pipeline, PipelineParts
from diffquant.runtime.schedules import SchedulerFacts
from diffquant.runtime.tokenizers import load_tokenizer

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PROMPT, NEGATIVE = "a cat, 35mm!", "blurry"
WORDS = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz,!0123456789"]


def t5_tokenizer(folder):
    """A Unigram tokenizer of single letters."""
    folder.mkdir()
    special = [
        {"id": i, "content": word, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i, word in enumerate(WORDS[:3])
    ]
    template = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]
    space = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "always",
        "split": True,
    }
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "byte_fallback": False,
            "vocab": [[word, -float(i)] for i, word in enumerate(WORDS)],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def clip_tokenizer(folder):
    """The toy tokenizer of test_tokenizers.py, with CLIP's 77 positions."""
    path = Path(__file__).with_name("test_tokenizers.py")
    spec = importlib.util.spec_from_file_location("toy_tokenizers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = {"bos_token": module.SPECIAL[0], "unk_token": module.SPECIAL[1]}
    words = module.toy_clip(folder, model_max_length=77, **names)
    return folder, len(words)


def tiny_clip(oracle, width, vocabulary):
    tf = oracle.transformers
    config = tf.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    return oracle.randomize(tf.CLIPTextModel(config), seed=1)


def tiny_vae(oracle, **config):
    reference = oracle.diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        **config,
    )
    return oracle.randomize(reference, seed=2)


def scheduler_of(oracle, name, **config):
    scheduler = getattr(oracle.diffusers, name)(**config)
    return scheduler, SchedulerFacts.from_config({"_class_name": name, **config})


@pytest.fixture(scope="module")
def sd15(oracle, tmp_path_factory):
    folder, vocabulary = clip_tokenizer(tmp_path_factory.mktemp("sd15") / "tokenizer")
    clip, vae = tiny_clip(oracle, 32, vocabulary), tiny_vae(oracle, scaling_factor=0.18215)
    unet = oracle.diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        layers_per_block=1,
    )
    oracle.randomize(unet, seed=3)
    scheduler, facts = scheduler_of(
        oracle,
        "PNDMScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    reference = oracle.diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip,
        tokenizer=oracle.transformers.CLIPTokenizer.from_pretrained(folder),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    parts = PipelineParts(
        architecture="sd15",
        denoiser=build("unet", oracle.unet_weights(unet), unet.config),
        vae=build("vae_kl", oracle.vae_weights(vae), vae.config),
        text_encoders=(build("clip", oracle.clip_weights(clip), clip.config.to_dict()),),
        tokenizers=(load_tokenizer(folder),),
        scheduler=facts,
    )
    return reference, Pipeline(parts)


def flux_pair(oracle, root, *, guidance, scheduler, in_channels=64, pipeline="FluxPipeline"):
    folder, vocabulary = clip_tokenizer(root / "tokenizer")
    clip = tiny_clip(oracle, 20, vocabulary)
    vae = tiny_vae(
        oracle,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    tf = oracle.transformers
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    config = tf.T5Config(vocab_size=len(WORDS), feed_forward_proj="gated-gelu", **sizes)
    t5 = oracle.randomize(tf.T5EncoderModel(config), seed=4)
    transformer = oracle.diffusers.FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=guidance,
    )
    oracle.randomize(transformer, seed=5)
    theirs, facts = scheduler_of(oracle, "FlowMatchEulerDiscreteScheduler", **scheduler)
    second = t5_tokenizer(root / "tokenizer_2")
    reference = getattr(oracle.diffusers, pipeline)(
        scheduler=theirs,
        vae=vae,
        text_encoder=clip,
        tokenizer=tf.CLIPTokenizer.from_pretrained(folder),
        text_encoder_2=t5,
        tokenizer_2=tf.PreTrainedTokenizerFast.from_pretrained(second),
        transformer=transformer,
    )
    reference.set_progress_bar_config(disable=True)
    encoders = (
        build("clip", oracle.clip_weights(clip), clip.config.to_dict()),
        build("t5", oracle.t5_weights(t5), config.to_dict()),
    )
    parts = PipelineParts(
        architecture="flux1",
        denoiser=build("flux", oracle.flux_weights(transformer), transformer.config),
        vae=build("vae_kl", oracle.vae_weights(vae), vae.config),
        text_encoders=encoders,
        tokenizers=(load_tokenizer(folder), load_tokenizer(second)),
        scheduler=facts,
    )
    return reference, Pipeline(parts)


@pytest.fixture(scope="module")
def dev(oracle, tmp_path_factory):
    scheduler = {"shift": 3.0, "use_dynamic_shifting": True}
    return flux_pair(oracle, tmp_path_factory.mktemp("dev"), guidance=True, scheduler=scheduler)


@pytest.fixture(scope="module")
def schnell(oracle, tmp_path_factory):
    root = tmp_path_factory.mktemp("schnell")
    return flux_pair(oracle, root, guidance=False, scheduler={"shift": 1.0})


def both(pair, ours, theirs, *, seed, width, height, steps=4):
    """Run the two pipelines from one seed: (ours, their latents, their picture)."""
    reference, pipeline = pair
    count = theirs.get("num_images_per_prompt", 1)
    generator = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
    common = {"width": width, "height": height, "num_inference_steps": steps, **theirs}
    latents = reference(PROMPT, generator=generator, output_type="latent", **common).images
    if latents.ndim == 3:  # Flux: packed
        latents = reference._unpack_latents(latents, height, width, reference.vae_scale_factor)
    vae = reference.vae
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    with torch.no_grad():
        decoded = vae.decode(z).sample
    image = reference.image_processor.postprocess(decoded, output_type="np")
    found = pipeline.generate(PROMPT, seed=seed, width=width, height=height, steps=steps, **ours)
    return found, latents, torch.from_numpy(np.asarray(image))


SAMPLERS = {
    None: None,
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
}


@pytest.mark.parametrize(("width", "height", "seed"), [(64, 128, 7), (72, 40, 0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sd15_equals_diffusers(sampler, width, height, seed, sd15, oracle):
    reference, _ = sd15
    own = reference.scheduler
    if sampler:  # what diffusers does with another class's config: only what the file says is taken
        reference.scheduler = getattr(oracle.diffusers, SAMPLERS[sampler]).from_config(own.config)
    try:
        found, latents, image = both(
            sd15,
            {"negative": NEGATIVE, "cfg": 7.5, "sampler": sampler},
            {"negative_prompt": NEGATIVE, "guidance_scale": 7.5},
            seed=seed,
            width=width,
            height=height,
        )
    finally:
        reference.scheduler = own
    oracle.assert_close(found.latents, latents, 1e-4)
    oracle.assert_close(found.images, image, 1e-3)
    assert found.sampler == (sampler or "pndm")
    assert found.calls == (4 if sampler else 5)


def test_sd15_without_guidance_equals_diffusers(sd15, oracle):
    found, latents, _ = both(
        sd15, {"cfg": 1.0, "batch": 2}, {"guidance_scale": 1.0, "num_images_per_prompt": 2},
        seed=3, width=64, height=64,
    )  # fmt: skip
    oracle.assert_close(found.latents, latents, 1e-4)


@pytest.mark.parametrize(("width", "height", "seed"), [(64, 96, 1), (112, 32, 5)])
def test_flux_dev_equals_diffusers(width, height, seed, dev, oracle):
    found, latents, image = both(
        dev,
        {"guidance": 2.5, "text_tokens": 40},
        {"guidance_scale": 2.5, "max_sequence_length": 40},
        seed=seed,
        width=width,
        height=height,
    )
    oracle.assert_close(found.latents, latents, 1e-4)
    oracle.assert_close(found.images, image, 1e-3)


def test_flux_with_a_negative_prompt_equals_diffusers(dev, oracle):
    found, _, image = both(
        dev,
        {"negative": NEGATIVE, "cfg": 3.0, "text_tokens": 16},
        {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "max_sequence_length": 16},
        seed=2,
        width=64,
        height=64,
    )
    oracle.assert_close(found.images, image, 1e-3)


def test_flux_schnell_equals_diffusers_and_takes_256_tokens(schnell, oracle):
    found, _, image = both(
        schnell,
        {},
        {"guidance_scale": 0.0, "max_sequence_length": 256},
        seed=2,
        width=64,
        height=64,
    )
    oracle.assert_close(found.images, image, 1e-3)
    assert found.images.dtype == torch.float32
    assert found.images.shape == (1, 64, 64, 3)


def test_batches_prompts_and_seeds_do_not_mix(sd15):
    pipeline = sd15[1]
    run = {"width": 64, "height": 64, "steps": 2, "sampler": "euler"}
    together = pipeline.generate([PROMPT, "a dog"], seed=[4, 9], **run)
    alone = pipeline.generate("a dog", seed=9, **run)
    assert together.images.shape == (2, 64, 64, 3)
    torch.testing.assert_close(together.latents[1:], alone.latents, atol=1e-4, rtol=1e-4)


def test_bfloat16_is_close_and_keeps_float32_latents(dev):
    _, pipeline = dev
    run = {"width": 64, "height": 64, "steps": 3, "text_tokens": 16, "guidance": 3.5}
    wanted = pipeline.generate(PROMPT, **run)
    parts = pipeline.parts
    modules = (parts.denoiser, *parts.text_encoders)
    try:
        for module in modules:
            module.to(torch.bfloat16)
        found = pipeline.generate(PROMPT, **run)
    finally:
        for module in modules:
            module.to(torch.float32)
    assert found.latents.dtype == torch.float32
    error = float((found.latents - wanted.latents).abs().mean())
    assert 0 < error < 0.2


def test_steps_are_reported_and_long_prompts_confessed(dev):
    seen = []
    found = dev[1].generate(
        "cat " * 90, width=32, height=32, steps=2, text_tokens=20, on_step=lambda *a: seen.append(a)
    )
    assert seen == [(1, 2), (2, 2)]
    assert [text.partition(":")[0] for text in found.truncated] == ["clip", "t5"]


def test_impossible_requests_are_refused(sd15, dev, schnell):
    small = {"width": 64, "height": 64, "steps": 1}
    with pytest.raises(UsageError, match=r"multiples of 8, found 60x64, nearest 64x64"):
        sd15[1].generate(PROMPT, width=60, height=64)
    with pytest.raises(UsageError, match="multiples of 16, found 64x72"):
        dev[1].generate(PROMPT, width=64, height=72)
    with pytest.raises(UsageError, match="no effect with cfg 1"):
        dev[1].generate(PROMPT, NEGATIVE, **small)
    with pytest.raises(UsageError, match="takes no guidance"):
        schnell[1].generate(PROMPT, guidance=3.5, **small)
    with pytest.raises(UsageError, match="takes no distilled guidance"):
        sd15[1].generate(PROMPT, guidance=3.5, **small)
    with pytest.raises(UsageError, match="2 seeds for 1 pictures"):
        sd15[1].generate(PROMPT, seed=[1, 2], **small)
    parts = PipelineParts(**{n: getattr(dev[1].parts, n) for n in PipelineParts.__slots__})
    with pytest.raises(
        UnknownFormat, match=r"architecture with a runtime 'flux', did you mean 'flux[12]'"
    ):
        Pipeline(
            PipelineParts(
                **{**{n: getattr(parts, n) for n in parts.__slots__}, "architecture": "flux"}
            )
        )


def test_latents_that_are_not_finite_stop_the_run(sd15):
    latents = torch.full((1, 4, 8, 8), float("nan"))
    with pytest.raises(VerificationError, match="not finite after step 1 of 3"):
        sd15[1].generate(PROMPT, width=64, height=64, steps=2, latents=latents, sampler="pndm")


def test_each_picture_of_a_batch_draws_from_its_own_generator():
    batch = NoiseSource([5, 6]).draw((2, 4, 2, 2))
    for row, seed in zip(batch, (5, 6), strict=True):
        alone = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(row[None], alone)
