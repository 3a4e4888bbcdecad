"""`quantize --error-lora`, `--bias-correction` and `verify --lora` on the command line."""

import numpy as np
import pytest

from diffquant.io.inputs import LayerInputs, write_inputs

QKV = "double_blocks.0.img_attn.qkv.weight"


@pytest.fixture
def flux(examples):
    return examples / "flux1-shapes"


@pytest.fixture
def inputs(tmp_path):
    path = tmp_path / "inputs.safetensors"
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(256).astype("f4")
    write_inputs(path, {QKV: LayerInputs(mean, np.eye(256, dtype="f4"), 4)}, {})
    return path


def test_an_error_lora_is_written_and_told(command, flux, tmp_path):
    out, lora = tmp_path / "a.gguf", tmp_path / "l.safetensors"
    ran = command("quantize", flux, "-o", out, "-t", "q4_k_s", "--error-lora", lora, "--rank", "8")
    assert ran.code == 0
    assert f"wrote {lora}" in ran.out
    assert "with it" in ran.out
    assert "rank 8, 13 layers (13 unweighed)" in ran.out
    again = command("quantize", flux, "-o", out, "-t", "q4_k_s", "--error-lora", lora)
    assert again.code == 2
    forced = command(
        "quantize", flux, "-o", out, "-t", "q4_k_s", "--error-lora", lora, "--force", "--json"
    )
    told = forced.result["error_lora"]
    assert (told["rank"], told["layers"]) == (32, 13)
    assert told["corrected_error"] < told["error"]
    assert lora.stat().st_size > told["nbytes"]


def test_an_existing_lora_is_refused_before_the_work(command, flux, tmp_path):
    lora = tmp_path / "l.safetensors"
    lora.write_bytes(b"mine")
    ran = command("quantize", flux, "-o", tmp_path / "a.gguf", "-t", "q8_0", "--error-lora", lora)
    assert (ran.code, lora.read_bytes()) == (2, b"mine")
    assert "use --force" in ran.err
    assert [one.name for one in tmp_path.iterdir()] == ["l.safetensors"]


def test_bias_correction_is_told_and_verified(command, flux, tmp_path, inputs):
    out, recipe = tmp_path / "a.safetensors", tmp_path / "r.txt"
    args = ("--bias-correction", "--inputs", inputs, "--emit-recipe", recipe)
    ran = command("quantize", flux, "-o", out, "-t", "nf4", *args)
    assert ran.code == 0
    assert "biases of 1 layers corrected by the mean inputs of inputs.safetensors" in ran.out
    assert "# biases of 1 layers corrected" in recipe.read_text()
    again = command(
        "quantize", flux, "-o", tmp_path / "b.gguf", "--recipe-from", recipe, "-t", "nf4"
    )
    assert "corrected" not in again.out
    judged = command("verify", out, "--against", flux, "--level", "tensors")
    assert judged.code == 0
    assert "1 biases were corrected, and are not judged" in judged.out


WRONG = {
    "bias without means": (("--bias-correction",), "needs the mean inputs"),
    "means for nothing": (("--inputs", "INPUTS"), "--inputs is for --rounding"),
    "rank for nothing": (("--rank", "8"), "give --error-lora"),
    "both": (
        ("--bias-correction", "--inputs", "INPUTS", "--error-lora", "l.safetensors"),
        "choose one",
    ),
    "rank 0": (("--error-lora", "l.safetensors", "--rank", "0"), "--rank"),
    "no such file": (("--bias-correction", "--inputs", "none.safetensors"), "none.safetensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_options_that_do_not_fit_together(command, flux, tmp_path, inputs, name):
    given, why = WRONG[name]
    args = [inputs if one == "INPUTS" else one for one in given]
    ran = command("quantize", flux, "-o", tmp_path / "a.gguf", "-t", "q4_k_s", *args)
    assert ran.code in (1, 2)
    assert why in ran.err
    assert not (tmp_path / "a.gguf").exists()


def test_verify_takes_a_lora_for_pictures_alone(command, flux, tmp_path):
    ran = command(
        "verify", flux, "--against", flux, "--level", "tensors", "--lora", "l.safetensors"
    )
    assert ran.code == 2
    assert "--level image" in ran.err
