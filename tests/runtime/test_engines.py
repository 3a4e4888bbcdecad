"""Files judged in the program that will load them: diffusers, and who read what is said."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from diffquant.cli.main import cli
from diffquant.cli.verify import command
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import (
    ArchitectureError,
    MissingKeys,
    UnknownFormat,
    UnmappedKeys,
    UsageError,
)
from diffquant.quant.types import type_named
from diffquant.runtime import scorers
from diffquant.runtime.compare import ImageSettings, compare_pictures
from diffquant.runtime.compare_files import compare_files
from diffquant.runtime.compare_settings import CompareSettings
from diffquant.runtime.engines import ENGINES, EngineFiles, open_side
from diffquant.runtime.engines import diffusers as diffusers_engine
from diffquant.runtime.engines.base import refuse_weights
from diffquant.runtime.engines.damage import shuffled_rows
from diffquant.runtime.engines.decoded import fill
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.verify import verify

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = scorers.DEMO_PROMPTS[1]
SD15, FLUX = EXAMPLES / "sd15-shapes", EXAMPLES / "flux1-shapes"
REQUEST = PictureRequest(PROMPT, seed=7, steps=3, cfg=3.0, width=64, height=64)
SETTINGS = ImageSettings(
    prompts=(PROMPT,), seeds=(0,), steps=4, cfg=3.0, size=(64, 64), engine="diffusers", min_psnr=20
)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _needs_diffusers(oracle):
    return oracle


def packed(tmp_path, source, name, suffix, **request):
    out = tmp_path / f"{source.name}-{name}{suffix}"
    run_job(source, out, Request(container_for(out), type=type_named(name), **request))
    return out


def test_files_are_compared_in_diffusers_and_who_read_them_is_said(tmp_path):
    out = packed(tmp_path, SD15, "q8_0", ".gguf")
    settings = CompareSettings(
        (PROMPT,), (0,), 3, 3.0, (64, 64), metrics=("psnr",), engine="diffusers"
    )
    comparison, _ = compare_files(SD15, [out], settings)
    row, floor, control = comparison.rows
    assert row.problems[0].startswith("unet read and run by diffusers")
    assert row.latent_error < control.latent_error
    assert control.values["psnr"].mean < row.values["psnr"].mean
    assert floor.kind == "floor"
    with pytest.raises(UsageError, match="the vae alone from another file"):
        open_side("diffusers", EngineFiles(SD15, swapped=(("vae", out),)))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux1", "qwen-image"])
def test_the_bundled_engine_and_diffusers_draw_the_same_picture(name):
    folder = EXAMPLES / f"{name}-shapes"
    request = replace(REQUEST, cfg=None) if name in ("flux1", "qwen-image") else REQUEST
    ours, theirs = (
        open_side(engine, EngineFiles(folder)).draw(request) for engine in ("bundled", "diffusers")
    )
    assert ours.shape == theirs.shape == (1, 64, 64, 3)
    assert np.abs(ours - theirs).max() < 1e-2


@pytest.mark.parametrize(
    ("source", "name", "suffix", "how"),
    [
        (SD15, "q8_0", ".gguf", "unet read and run by diffusers"),
        (SD15, "f16", ".safetensors", "read and run by diffusers, configs from"),
        (SD15, "fp8_scaled", ".safetensors", "decoded by diffquant, run by diffusers: it has no"),
        (FLUX, "q8_0", ".gguf", "decoded by diffquant, run by diffusers: its converter cuts"),
    ],
)
def test_who_reads_the_file_is_said_and_the_picture_is_the_bundled_ones(
    tmp_path, source, name, suffix, how
):
    out = packed(tmp_path, source, name, suffix)
    request = replace(REQUEST, cfg=None) if source is FLUX else REQUEST
    side = open_side("diffusers", EngineFiles(out, base=source))
    assert side.how.startswith(how)
    assert side.engine.startswith("diffusers 0.")
    assert side.size == (128, 128) or source is FLUX
    ours = open_side("bundled", EngineFiles(out, base=source)).draw(request)
    # diffusers multiplies GGUF scales in float16 where ggml's definition has float32
    assert np.abs(side.draw(request) - ours).max() < (0.05 if suffix == ".gguf" else 1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes reads it on a GPU")
def test_a_packed_folder_is_decoded_for_a_machine_without_a_gpu(tmp_path):
    out = packed(tmp_path, SD15, "nf4", "")
    side = open_side("diffusers", EngineFiles(out, base=SD15))
    assert side.how.endswith("nf4 weights, and its bitsandbytes loader wants a GPU")
    with pytest.raises(UsageError, match="give its unpacked Diffusers folder with --base"):
        open_side("diffusers", EngineFiles(out))


def test_a_file_is_verified_in_diffusers_with_floor_and_control(tmp_path):
    out = packed(tmp_path, SD15, "q8_0", ".gguf")
    report, pictures, _ = compare_pictures(out, SD15, SETTINGS)
    assert report.verdict == "pass"
    assert report.psnr_db > 20
    assert report.control_psnr_db < 20
    assert "rows of" in report.control_block
    assert report.noise_floor_psnr_db is not None
    assert report.engine.startswith("diffusers")
    assert len(pictures.candidate) == 1


def sd3_folder(oracle, folder):
    """A random SD3 of one block, without T5, which its pipeline then replaces by zeros."""
    diffusers, tf = oracle.diffusers, oracle.transformers
    words = tf.CLIPTokenizer.from_pretrained(SD15 / "tokenizer")
    text = tf.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
    )
    clips = [oracle.randomize(tf.CLIPTextModelWithProjection(text), seed=one) for one in (3, 4)]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=16,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    oracle.randomize(transformer, seed=1), oracle.randomize(vae, seed=2)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clips[0],
        text_encoder_2=clips[1],
        text_encoder_3=None,
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)
    return folder


def test_a_family_without_a_bundled_model_is_verified_by_its_pictures(oracle, tmp_path):
    folder = sd3_folder(oracle, tmp_path / "source")
    out = packed(tmp_path, folder, "fp8_scaled", ".safetensors")
    with pytest.raises(ArchitectureError, match="--engine diffusers"):
        verify(out, folder, settings=replace(SETTINGS, engine="bundled", cfg=None))
    report = verify(out, folder, settings=replace(SETTINGS, cfg=1.0, min_psnr=15))
    assert report.load.architecture == "sd3"
    assert report.image.how.startswith("decoded by diffquant")
    assert report.image.psnr_db > 15
    assert report.image.control_psnr_db < report.image.psnr_db


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rng": "philox"}, "rng"),
        ({"image": torch.zeros(1, 64, 64, 3)}, "image"),
        ({"cfg_cutoff": 0.5, "shift": 2.0}, "cfg_cutoff, shift"),
    ],
)
def test_what_an_engine_cannot_honour_is_refused_by_name(fields, named):
    side = open_side("diffusers", EngineFiles(SD15))
    with pytest.raises(UsageError, match=f"cannot honour {named}:"):
        side.draw(replace(REQUEST, **fields))


@pytest.mark.parametrize(("given", "scale"), [({}, 8.0), ({"guidance": 2.5, "cfg": 1.0}, 2.5)])
def test_a_latent_consistency_model_is_given_guidance_and_no_cfg(given, scale):
    pipeline = SimpleNamespace(unet=SimpleNamespace(config={"time_cond_proj_dim": 256}))
    request = replace(REQUEST, **{"cfg": None, **given})
    assert diffusers_engine._guidance(request, {}, pipeline) == {"guidance_scale": scale}
    with pytest.raises(UsageError, match="with guidance, not with cfg"):
        diffusers_engine._guidance(replace(request, cfg=7.5), {}, pipeline)


def test_samplers_schedules_and_guidance_go_under_its_names():
    side = open_side("diffusers", EngineFiles(SD15))
    named = side.draw(replace(REQUEST, sampler="euler", schedule="trailing"))
    assert type(side.pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    assert side.pipeline.scheduler.config.timestep_spacing == "trailing"
    own = side.draw(REQUEST)
    assert type(side.pipeline.scheduler).__name__ == "PNDMScheduler"
    assert np.abs(named - own).max() > 1e-3
    with pytest.raises(UsageError, match="no scheduler for sampler 'sorcery'"):
        side.draw(replace(REQUEST, sampler="sorcery"))
    with pytest.raises(UsageError, match="knows no schedule 'sorcery'"):
        side.draw(replace(REQUEST, schedule="sorcery"))
    with pytest.raises(UsageError, match="takes no distilled guidance"):
        side.draw(replace(REQUEST, guidance=3.5))
    with pytest.raises(UsageError, match="takes no max_sequence_length"):
        side.draw(replace(REQUEST, text_tokens=77))


def test_weights_in_a_prompt_are_not_read_as_words():
    side = open_side("diffusers", EngineFiles(SD15))
    weighed = replace(REQUEST, prompt="a (red:1.2) circle")
    with pytest.raises(UsageError, match="reads weights in a prompt as plain"):
        side.draw(weighed)
    assert side.draw(replace(weighed, prompt_style="plain")).shape == (1, 64, 64, 3)
    refuse_weights("sdcpp", replace(weighed, prompt_style="a1111"), "a1111")
    for style in ("comfy", "plain"):  # it would weigh them in its own way
        with pytest.raises(UsageError, match="as a1111"):
            refuse_weights("sdcpp", replace(weighed, prompt_style=style), "a1111")
    refuse_weights("sdcpp", REQUEST, "a1111")


def test_a_batch_has_the_seeds_of_the_bundled_runtime():
    request = replace(REQUEST, batch=2)
    ours, theirs = (
        open_side(engine, EngineFiles(SD15)).draw(request) for engine in ("bundled", "diffusers")
    )
    assert ours.shape == (2, 64, 64, 3)
    assert np.abs(ours - theirs).max() < 1e-2


def test_generate_draws_elsewhere_and_says_so(tmp_path):
    out = tmp_path / "out.png"
    options = ["--engine", "diffusers", "--size", "64x64", "--steps", "2", "--cfg", "3", "--json"]
    ran = CliRunner().invoke(cli, ["generate", str(SD15), "-p", PROMPT, "-o", str(out), *options])
    found = json.loads(ran.stdout)
    assert ran.exit_code == 0, ran.stderr
    assert found["result"]["parameters"]["how"] == "read and run by diffusers"
    assert found["result"]["parameters"]["engine"].startswith("diffusers")
    assert out.stat().st_size > 1000
    further = ("--hires", "2", "--preview", "rgb")
    refused = CliRunner().invoke(
        cli,
        ["generate", str(SD15), "-p", PROMPT, "-o", str(out), "--force", *options[:2], *further],
    )
    assert refused.exit_code == 2
    assert "takes no --preview, --hires" in refused.stderr


def test_it_says_what_it_needs(tmp_path, monkeypatch):
    out = packed(tmp_path, SD15, "q8_0", ".gguf")
    with pytest.raises(UsageError, match=r"needs configs and tokenizers.*--base"):
        open_side("diffusers", EngineFiles(out))
    with pytest.raises(UsageError, match="takes no --vae"):
        open_side("diffusers", EngineFiles(SD15, vae=out))
    with pytest.raises(UnknownFormat, match="bundled, diffusers, sdcpp"):
        open_side("diffuser", EngineFiles(SD15))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs diffusers, not installed: pip install"):
        open_side("diffusers", EngineFiles(SD15))


def test_the_command_line_names_every_engine_and_reports_it(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPT)
    options = ["--engine", "diffusers", "--size", "64", "--steps", "2", "--seeds", "0", "--json"]
    ran = CliRunner().invoke(
        cli, ["verify", str(SD15), "--against", str(SD15), "--prompts", str(prompts), *options]
    )
    image = json.loads(ran.stdout)["result"]["image"]
    assert image["identical"]
    assert image["how"] == "read and run by diffusers"
    (option,) = [one for one in command.params if one.name == "engine"]
    assert list(option.type.choices) == list(ENGINES)


def test_rows_are_put_back_after_the_damage():
    block = torch.nn.Linear(3, 8)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    before = block.weight.detach().clone()
    with shuffled_rows(model) as said:
        assert said == "rows of blocks.0 shuffled"
        assert not torch.equal(block.weight, before)
    assert torch.equal(block.weight, before)
    with shuffled_rows(torch.nn.Linear(3, 1)) as said:
        assert said is None


def test_decoded_weights_fit_exactly_or_not_at_all():
    from diffquant.convert.jobs import opened

    with opened(SD15) as (_, logical, match):
        part = match.part("text_encoder")
        with pytest.raises(UnmappedKeys, match="Linear has no text_model"):
            fill(torch.nn.Linear(2, 2), logical, part)
        some = replace(part, shapes=dict(list(part.shapes.items())[:-1]))
        import transformers

        whole = transformers.CLIPTextModel.from_pretrained(SD15 / "text_encoder")
        with pytest.raises(MissingKeys, match="the file has no"):
            fill(whole, logical, some)
        assert fill(whole, logical, part) == len(part.shapes)
