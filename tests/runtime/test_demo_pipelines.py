"""The main job end to end on the demo checkpoints: pack, open, generate, judge."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.quant.types import type_named
from diffquant.runtime import scorers
from diffquant.runtime.compare import ImageSettings, compare_pictures, make_reference
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.verify import verify

EXAMPLES = Path(__file__).parents[2] / "examples"
SD15, FLUX = EXAMPLES / "sd15-shapes", EXAMPLES / "flux1-shapes"
SDXL, QWEN = EXAMPLES / "sdxl-shapes", EXAMPLES / "qwen-image-shapes"
PROMPT = scorers.DEMO_PROMPTS[1]
SETTINGS = ImageSettings(prompts=(PROMPT,), seeds=(0,), steps=6, size=(128, 128))


@pytest.fixture(scope="module", autouse=True)
def _private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(source, type, suffix) -> the packed model, made once; tests do not change it."""
    folder = tmp_path_factory.mktemp("packed")

    def make(source, name, suffix):
        out = folder / f"{source.name}-{name}{suffix}"
        if not out.exists():
            run_job(source, out, Request(container=container_for(out), type=type_named(name)))
        return out

    return make


@pytest.fixture(scope="module")
def reference():
    """Flux's own pictures; no gate is part of them."""
    return make_reference(FLUX, SETTINGS)


@pytest.fixture(scope="module")
def qwen_picture():
    """(1, 128, 128, 3) by the unpacked Qwen-Image."""
    opened = open_pipeline(QWEN)
    return opened.pipeline.generate(PROMPT, steps=6, width=128, height=128).images


@pytest.mark.parametrize(
    ("source", "steps", "options"),
    [
        (SD15, 20, {"cfg": 3.0, "sampler": "ddim"}),
        (SDXL, 20, {"cfg": 3.0}),
        (FLUX, 20, {}),
        (QWEN, 20, {}),
    ],
    ids=["sd15", "sdxl", "flux1", "qwen_image"],
)
def test_originals_show_what_the_prompt_asks_for(source, steps, options):
    opened = open_pipeline(source)
    made = opened.pipeline.generate(PROMPT, seed=0, steps=steps, width=128, height=128, **options)
    assert scorers.score(made.images[0].numpy(), PROMPT).total > 0.9


@pytest.mark.parametrize(
    ("name", "suffix", "least"),
    [
        ("q8_0", ".gguf", 50),
        ("q4_k_s", ".gguf", 30),
        ("fp8_scaled", ".safetensors", 35),
        ("int8_rowwise", ".safetensors", 45),
        ("nf4", ".safetensors", 28),
        ("nf4", "", 28),
    ],
)
def test_packed_flux_draws_the_same_picture_and_its_control_does_not(
    packed, reference, name, suffix, least
):
    out = packed(FLUX, name, suffix)
    report, pictures, _ = compare_pictures(out, FLUX, SETTINGS, reference=reference)
    assert report.verdict == "pass"
    assert report.psnr_db > least
    assert report.control_psnr_db < report.min_psnr_db
    assert len(pictures.candidate) == 1


def test_packed_sd15_verifies_at_every_level(packed):
    out = packed(SD15, "q8_0", ".gguf")
    report = verify(out, SD15, settings=replace(SETTINGS, cfg=3.0))
    assert (report.verdict, report.load.verdict, report.tensors.verdict) == ("pass",) * 3
    assert report.image.psnr_db > 50
    assert report.image.noise_floor_psnr_db > 30


def test_a_gate_above_what_the_file_reaches_fails(packed, reference):
    out = packed(FLUX, "nf4", ".safetensors")
    strict = replace(SETTINGS, min_psnr=70.0)
    report, _, _ = compare_pictures(out, FLUX, strict, reference=reference)
    assert report.verdict == "fail"
    assert "below the gate of 70 dB" in report.problems[0]


def test_a_gate_that_the_control_passes_is_no_gate(packed, reference):
    out = packed(FLUX, "q8_0", ".gguf")
    loose = replace(SETTINGS, min_psnr=1.0)
    report, _, _ = compare_pictures(out, FLUX, loose, reference=reference)
    assert report.verdict == "fail"
    assert "this gate cannot fail" in report.problems[-1]


def test_another_model_fails_at_load_level():
    report = verify(FLUX, SD15, level="load")
    assert report.verdict == "fail"
    assert "expected sd15, found flux1" in report.load.problems[0]


def test_a_damaged_weight_fails_at_tensor_level(packed, tmp_path):
    out = tmp_path / "damaged.gguf"
    data = bytearray(packed(FLUX, "q8_0", ".gguf").read_bytes())
    data[-200_000:-100_000] = np.random.default_rng(0).bytes(100_000)
    out.write_bytes(bytes(data))
    report = verify(out, FLUX, level="tensors")
    assert report.verdict == "fail"
    assert report.tensors.worst[0].verdict == "fail"


def test_every_part_stays_packed_in_memory(packed):
    out = packed(FLUX, "q4_k_s", ".gguf")
    opened = open_pipeline(out, base=FLUX)
    denoiser = next(part for part in opened.origins if part.name == "denoiser")
    assert denoiser.formats["q4_k"] > 0.8 * sum(denoiser.formats.values())
    assert denoiser.nbytes < out.stat().st_size
    assert opened.warnings == ()


def test_the_source_is_remembered_and_its_parts_are_used(packed):
    out = packed(FLUX, "q8_0", ".gguf")
    opened = open_pipeline(out)
    assert {part.path for part in opened.origins if part.name != "denoiser"} == {str(FLUX)}


def test_missing_parts_are_all_listed(packed, tmp_path, monkeypatch):
    out = packed(FLUX, "q8_0", ".gguf")
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"has no vae, text_encoder, text_encoder_2.*--base"):
        open_pipeline(out)


def test_a_family_without_runtime_says_so(monkeypatch):
    monkeypatch.setattr("diffquant.runtime.providers.FAMILIES", {})
    with pytest.raises(ArchitectureError, match="flux1 has no runtime yet"):
        open_pipeline(FLUX)


@pytest.mark.parametrize(
    ("part", "name", "suffix", "least"),
    [
        ("denoiser", "q8_0", ".gguf", 45),
        ("denoiser", "nf4", ".safetensors", 25),
        ("text_encoder", "q4_k_s", ".gguf", 30),
        ("text_encoder", "int8_rowwise", ".safetensors", 40),
    ],
)
def test_packed_parts_of_qwen_image_draw_the_same_picture(
    qwen_picture, tmp_path, part, name, suffix, least
):
    out = tmp_path / f"{part}-{name}{suffix}"
    run_job(QWEN, out, Request(container=container_for(out), type=type_named(name), parts=(part,)))
    model, added = (out, {}) if part == "denoiser" else (QWEN, {part: out})
    opened = open_pipeline(model, base=QWEN, added=added)
    formats = next(one.formats for one in opened.origins if one.name == part)
    assert sum(formats.get(one, 0) for one in ("f32", "bf16")) < 0.2 * sum(formats.values())
    assert opened.warnings == ()
    picture = opened.pipeline.generate(PROMPT, steps=6, width=128, height=128).images
    error = float((picture - qwen_picture).square().mean())
    assert -10 * np.log10(error) > least


def test_a_gguf_text_encoder_says_its_own_heads(tmp_path):
    """The folder that brings the rest is of another size: its config is not the file's."""
    out, base = tmp_path / "qwen.gguf", tmp_path / "base"
    kind = type_named("q8_0")
    run_job(QWEN, out, Request(container=container_for(out), type=kind, parts=("text_encoder",)))
    shutil.copytree(QWEN, base)
    path = base / "text_encoder" / "config.json"
    path.write_text(
        path.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4')
    )
    opened = open_pipeline(base, added={"text_encoder": out})
    assert opened.pipeline.parts.text_encoders[0].config.heads == 2
    assert open_pipeline(base).pipeline.parts.text_encoders[0].config.heads == 4


def test_a_vae_file_replaces_the_models_own(tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(SD15 / "vae" / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 0.3  # a visible change of colour
    save_file(weights, tmp_path / "vae.safetensors")
    plain, other = open_pipeline(SD15), open_pipeline(SD15, vae=tmp_path / "vae.safetensors")
    latents = torch.zeros(1, 4, 8, 8)
    assert float((other.pipeline.decode(latents) - plain.pipeline.decode(latents)).mean()) > 0.02
    with pytest.raises(UsageError, match=r"expected a vae \(vae_kl\), found"):
        open_pipeline(SD15, vae=SD15 / "text_encoder" / "model.safetensors")


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("source", "options", "cfg"),
    [
        (SD15, {"guidance_scale": 3.0}, 3.0),
        (SDXL, {"guidance_scale": 3.0}, 3.0),
        (FLUX, {"guidance_scale": 3.5}, None),
        (QWEN, {"true_cfg_scale": 3.0, "negative_prompt": " "}, 3.0),
    ],
    ids=["sd15", "sdxl", "flux1", "qwen_image"],
)
def test_diffusers_draws_the_same_picture_from_the_same_seed(source, options, cfg):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {**options, "height": 128, "width": 128, "num_inference_steps": 5}
    generator = torch.Generator("cpu").manual_seed(7)
    theirs = pipeline(PROMPT, generator=generator, output_type="np", **options).images[0]
    ours = open_pipeline(source).pipeline.generate(
        PROMPT, seed=7, steps=5, width=128, height=128, cfg=cfg
    )
    assert np.abs(ours.images[0].numpy() - theirs).max() < 1e-2
