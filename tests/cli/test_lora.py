"""`diffquant lora ...`: exit codes, screens and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink

ATTN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"


def write(path, tensors):
    specs = [TensorSpec(key, "F32", one.shape) for key, one in tensors.items()]
    with open_sink(path, specs, {}, force=True) as sink:
        for key, one in tensors.items():
            sink.write(key, 0, np.ascontiguousarray(one).reshape(-1).view(np.uint8))
        sink.commit()
    return path


def layer(name, rows, columns, rank=4):
    rng = np.random.default_rng(0)
    return {
        f"{name}.lora_down.weight": rng.standard_normal((rank, columns), np.float32),
        f"{name}.lora_up.weight": rng.standard_normal((rows, rank), np.float32),
    }


@pytest.fixture
def sd15(examples):
    return examples / "sd15-shapes"


@pytest.fixture
def fitting(tmp_path):
    tensors = {**layer(f"{ATTN}_to_q", 64, 64), **layer(f"{ATTN}_to_v", 64, 64)}
    return write(tmp_path / "fits.safetensors", tensors)


def test_a_lora_that_fits_is_said_to(command, fitting, sd15):
    ran = command("lora", "check", fitting, sd15, "--strength")
    assert ran.code == 0
    assert "applies: all 2 layers fit" in ran.out
    assert "input_blocks.1" in ran.out
    assert "#" * 30 in ran.out


def test_the_strength_is_the_norm_of_the_delta(command, fitting, sd15):
    found = command("lora", "check", fitting, sd15, "--strength", "--json").result
    pair = layer("x", 64, 64)
    delta = pair["x.lora_up.weight"] @ pair["x.lora_down.weight"]
    assert found["layers"][0]["strength"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    assert found["strengths"][0]["norm"] == pytest.approx(np.linalg.norm(delta) * 2**0.5, rel=1e-5)


@pytest.mark.parametrize("columns", [80, 140])
def test_layers_that_do_not_fit_are_named_with_the_reason(
    command, tmp_path, sd15, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    tensors = {
        **layer(f"{ATTN}_to_q", 64, 64),
        **layer(f"{ATTN}_to_k", 320, 320),
        **layer("lora_unet_nowhere", 8, 8),
        **layer("lora_te2_text_model_encoder_layers_0_mlp_fc1", 8, 8),
    }
    lora = write(tmp_path / "part.safetensors", tensors)
    ran = command("lora", "check", lora, sd15)
    assert ran.code == 3
    assert "applies in part: 1 of 4 layers fit" in ran.out
    assert "it is for a weight of shape (320, 320), the model has (64, 64)" in ran.out
    assert "the denoiser has no such layer" in ran.out
    assert "1 layers are for text_encoder_2" in ran.out
    assert max(map(len, ran.out.splitlines()[1:])) <= columns


def test_another_familys_lora_does_not_apply(command, tmp_path, sd15):
    tensors = {}
    for index in range(19):
        tensors |= layer(f"lora_unet_double_blocks_{index}_img_attn_proj", 3072, 3072, rank=1)
    lora = write(tmp_path / "flux.safetensors", tensors)
    ran = command("lora", "check", lora, sd15)
    assert ran.code == 3
    assert "made for flux1" in ran.out
    assert "the model is sd15: nothing can load it there" in ran.out
    alone = command("lora", "check", lora)
    assert alone.code == 0
    assert "the published flux1" in alone.out


def test_a_lora_of_the_first_blocks_alone_is_told(command, tmp_path):
    tensors = {}
    for index in range(28):
        tensors |= layer(f"diffusion_model.blocks.{index}.self_attn.q", 5120, 5120, rank=1)
    ran = command("lora", "check", write(tmp_path / "wan.safetensors", tensors))
    assert ran.code == 0
    assert "it touches the first 28 of 40 blocks of blocks" in " ".join(ran.out.split())


def test_a_half_layer_is_malformed(command, tmp_path, sd15):
    tensors = layer(f"{ATTN}_to_q", 64, 64)
    del tensors[f"{ATTN}_to_q.lora_up.weight"]
    ran = command("lora", "check", write(tmp_path / "half.safetensors", tensors), sd15)
    assert ran.code == 1
    assert f"{ATTN}_to_q: the up factor" in ran.err


def test_convert_and_resize_write_and_refuse(command, fitting, tmp_path, sd15):
    out = tmp_path / "out.safetensors"
    assert (
        "would write"
        in command(
            "lora", "convert", fitting, out, "--to", "comfy", "--base", sd15, "--dry-run"
        ).out
    )
    assert not out.exists()
    ran = command("lora", "convert", fitting, out, "--to", "comfy", "--base", sd15)
    assert ran.code == 0
    assert "kohya -> ComfyUI" in ran.out
    assert command("lora", "convert", fitting, out, "--to", "comfy", "--base", sd15).code == 2
    assert command("lora", "check", out, sd15).code == 0
    small = tmp_path / "small.safetensors"
    ran = command("lora", "resize", out, small, "--rank", 2)
    assert ran.code == 0
    assert "rank (layers): 2 (2)" in ran.out
    assert command("lora", "resize", out, small).code == 2
    assert command("lora", "resize", out, tmp_path / "x.gguf", "--rank", 2).code == 2


def test_extract_and_transfer_have_screens(command, tmp_path, sd15, examples):
    changed = tmp_path / "tuned.safetensors"
    assert command("convert", sd15, changed, "--dtype", "bf16").code == 0
    out = tmp_path / "lora.safetensors"
    ran = command("lora", "extract", changed, sd15, "-o", out, "--rank", 1)
    assert ran.code == 0  # rounding to bf16 is a difference too
    assert "of the squared difference" in ran.out
    model = tmp_path / "model.gguf"
    ran = command(
        "lora", "transfer", changed, sd15, sd15, "-o", model, "-t", "q8_0", "--weight", 0.5
    )
    assert ran.code == 0
    assert "tensors get 0.5 x (tuned.safetensors - sd15-shapes)" in ran.out
    other = examples / "flux1-shapes"
    ran = command("lora", "transfer", changed, sd15, other, "-o", tmp_path / "x", "--dry-run")
    assert ran.code == 4
    assert "one architecture" in ran.err


@pytest.mark.parametrize("name", ["check", "convert", "extract", "resize", "transfer"])
def test_every_subcommand_has_help(command, name):
    ran = command("lora", name, "--help")
    assert ran.code == 0
    assert all(flag in ran.out for flag in ("--json", "-q", "-v", "--no-progress"))
