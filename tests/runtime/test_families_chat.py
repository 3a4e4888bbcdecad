"""Z-Image and Flux.2 klein as whole folders and single files, against diffusers' pipelines.

Random tiny models, saved by diffusers, opened from the path as a user would. Their prompts are
turns of a chat with Qwen3, whose template is restated here.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import UsageError
from diffquant.quant.types import type_named
from diffquant.runtime.opening import open_pipeline

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

WORDS = Path(__file__).parents[2] / "examples" / "qwen-image-shapes" / "tokenizer"
PROMPT = "a small red circle"
SIZE = {"width": 64, "height": 48}
# Qwen3's, for messages without tools, thoughts or a system
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def tokenizer(oracle):
    found = oracle.transformers.Qwen2TokenizerFast.from_pretrained(WORDS)
    found.chat_template = TEMPLATE
    return found


def text_encoder(oracle, words, *, layers):
    config = oracle.transformers.Qwen3Config(
        vocab_size=words,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return oracle.randomize(oracle.transformers.Qwen3ForCausalLM(config), seed=5)


def scheduler(oracle, **config):
    return oracle.diffusers.FlowMatchEulerDiscreteScheduler(**config)


def levels(count):
    return {
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }


def z_image(oracle):
    words = tokenizer(oracle)
    transformer = oracle.diffusers.ZImageTransformer2DModel(
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=(8, 12, 12),
        axes_lens=(1024, 64, 64),
    )
    vae = oracle.diffusers.AutoencoderKL(
        latent_channels=16,
        block_out_channels=(16, 16, 32, 32),
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **levels(4),
    )
    # as small as a trained one's predictions, so that steps do not run away
    oracle.randomize(transformer, seed=4).all_final_layer["2-1"].linear.weight.data *= 0.02
    return oracle.diffusers.ZImagePipeline(
        scheduler=scheduler(oracle, shift=3.0),
        vae=oracle.randomize(vae, seed=2),
        text_encoder=text_encoder(oracle, len(words), layers=3).model,
        tokenizer=words,
        transformer=transformer,
    )


def klein(oracle, *, distilled=False):
    words = tokenizer(oracle)
    transformer = oracle.diffusers.Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=72,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    vae = oracle.diffusers.AutoencoderKLFlux2(
        latent_channels=8, block_out_channels=(16, 16, 32, 32), **levels(4)
    )
    oracle.randomize(vae, seed=2).bn.running_var.abs_()
    return oracle.diffusers.Flux2KleinPipeline(
        scheduler=scheduler(oracle, shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder(oracle, len(words), layers=28),
        tokenizer=words,
        transformer=oracle.randomize(transformer, seed=4),
        is_distilled=distilled,
    )


MAKERS = {"z_image": z_image, "flux2": klein}


@pytest.fixture(scope="module")
def saved(oracle, tmp_path_factory):
    """slug -> (diffusers pipeline, folder, single file)."""
    found = {}
    for slug, make in MAKERS.items():
        pipeline = make(oracle)
        pipeline.set_progress_bar_config(disable=True)
        root = tmp_path_factory.mktemp(slug)
        pipeline.save_pretrained(root / "folder")
        single = root / f"{slug}.safetensors"
        run_job(root / "folder", single, Request(container=container_for(single)))
        found[slug] = (pipeline, root / "folder", single)
    return found


def opened(saved, slug, kind="folder"):
    _, folder, single = saved[slug]
    return open_pipeline(folder) if kind == "folder" else open_pipeline(single, base=folder)


def wanted(saved, slug, prompt, *, cfg=1.0, steps=4, **options):
    """Pictures of diffusers (B, H, W, 3) from the noise of seed 7."""
    count = 1 if isinstance(prompt, str) else len(prompt)
    pipeline = saved[slug][0]
    # Z-Image counts guidance from 0, as much more than none
    strength = cfg - 1 if slug == "z_image" else cfg
    return pipeline(
        prompt=prompt,
        generator=[torch.Generator().manual_seed(7 + i) for i in range(count)],
        num_inference_steps=steps,
        guidance_scale=strength,
        output_type="np",
        **SIZE,
        **options,
    ).images


def latents(saved, slug, prompt, *, cfg=1.0, steps=4, **options):
    """Latents of diffusers before they are unscaled."""
    found = []

    def keep(_, index, t, held):
        found.append(held["latents"])
        return held

    pictures = wanted(
        saved, slug, prompt, cfg=cfg, steps=steps, callback_on_step_end=keep, **options
    )
    last = found[-1]
    if slug == "flux2":  # tokens
        last = last.transpose(1, 2).reshape(len(last), -1, *(n // 16 for n in (48, 64)))
    return last, torch.from_numpy(np.asarray(pictures))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("slug", list(MAKERS))
def test_four_steps_end_where_diffusers_ends(oracle, saved, slug, kind, cfg):
    theirs, pictures = latents(saved, slug, PROMPT, cfg=cfg)
    side = opened(saved, slug, kind)
    assert side.architecture == slug
    ours = side.pipeline.generate(PROMPT, seed=7, steps=4, cfg=cfg, **SIZE)
    oracle.assert_close(ours.latents, theirs, 1e-4)
    oracle.assert_close(ours.images, pictures, 1e-4)


@pytest.mark.parametrize("slug", list(MAKERS))
def test_prompts_of_several_lengths_run_as_one_batch(oracle, saved, slug):
    prompts = [PROMPT, "a green square " * 9]
    theirs, _ = latents(saved, slug, list(prompts), steps=2)
    ours = opened(saved, slug).pipeline.generate(prompts, seed=7, steps=2, **SIZE)
    oracle.assert_close(ours.latents, theirs, 1e-4)


@pytest.mark.parametrize("slug", list(MAKERS))
def test_what_does_not_fit_is_cut_and_said(oracle, saved, slug):
    prompt = "a small blue square above " * 20
    theirs, _ = latents(saved, slug, prompt, steps=1, max_sequence_length=40)
    ours = opened(saved, slug).pipeline.generate(prompt, seed=7, steps=1, text_tokens=40, **SIZE)
    oracle.assert_close(ours.latents, theirs, 1e-4)
    (cut,) = ours.truncated
    assert cut.startswith("qwen3: ")
    assert prompt.strip().endswith(cut.removeprefix("qwen3: "))


def test_a_negative_prompt_of_z_image(oracle, saved):
    theirs, _ = latents(saved, "z_image", PROMPT, cfg=3.0, negative_prompt="blurry")
    ours = opened(saved, "z_image").pipeline.generate(
        PROMPT, "blurry", seed=7, steps=4, cfg=3.0, **SIZE
    )
    oracle.assert_close(ours.latents, theirs, 1e-4)


def test_a_distilled_model_refuses_guidance(oracle, tmp_path):
    klein(oracle, distilled=True).save_pretrained(tmp_path)
    pipeline = open_pipeline(tmp_path).pipeline
    with pytest.raises(UsageError, match="runs without guidance"):
        pipeline.generate(PROMPT, steps=1, cfg=4.0, **SIZE)


@pytest.mark.parametrize("slug", list(MAKERS))
def test_distilled_strength_is_refused(saved, slug):
    with pytest.raises(UsageError, match="takes no distilled guidance"):
        opened(saved, slug).pipeline.generate(PROMPT, steps=1, guidance=3.5, **SIZE)


@pytest.mark.parametrize("slug", list(MAKERS))
def test_no_text_tokens_are_refused(saved, slug):
    with pytest.raises(UsageError, match="at least 1, found 0"):
        opened(saved, slug).pipeline.generate(PROMPT, steps=1, text_tokens=0, **SIZE)


def test_packed_weights_make_nearly_the_same_picture(saved, tmp_path):
    _, folder, _ = saved["flux2"]
    small = tmp_path / "small.safetensors"
    run_job(folder, small, Request(type=type_named("int8_rowwise"), container=container_for(small)))
    plain, packed = (
        open_pipeline(path, base=folder).pipeline.generate(PROMPT, seed=7, steps=2, **SIZE).latents
        for path in (folder, small)
    )
    assert 0 < float((plain - packed).norm() / plain.norm()) < 0.05
