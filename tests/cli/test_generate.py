import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from diffquant.cli.main import cli
from diffquant.runtime.scorers import DEMO_PROMPTS

EXAMPLES = Path(__file__).parents[2] / "examples"
SD15, FLUX = EXAMPLES / "sd15-shapes", EXAMPLES / "flux1-shapes"


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


def call(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def generate(model, out, *more):
    return call("generate", model, "-p", DEMO_PROMPTS[0], "--steps", 2, "-o", out, *more)


def refused(result, code, *words):
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


def test_a_picture_carries_its_parameters(tmp_path):
    out = tmp_path / "out.png"
    result = generate(FLUX, out, "--seed", 3)
    assert result.exit_code == 0, result.output
    picture = Image.open(out)
    assert picture.size == (128, 128)  # the model's own size
    text = picture.text["parameters"]
    assert text.startswith(DEMO_PROMPTS[0])
    assert "Steps: 2" in text
    assert "Seed: 3" in text
    assert json.loads(picture.text["diffquant"])["size"] == [128, 128]


def test_the_same_seed_gives_the_same_picture_and_another_does_not(tmp_path):
    pictures = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert generate(SD15, tmp_path / f"{name}.png", "--seed", seed).exit_code == 0
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_json_names_parts_and_parameters(tmp_path):
    result = generate(SD15, tmp_path / "out.png", "--json")
    body = json.loads(result.stdout)
    assert body["ok"]
    assert {part["name"] for part in body["result"]["parts"]} == {
        "denoiser",
        "vae",
        "text_encoder",
    }


def test_an_impossible_size_is_one_line_with_the_nearest(tmp_path):
    refused(generate(FLUX, tmp_path / "o.png", "--size", "100x100"), 2, "multiples of 16", "96x96")
    refused(generate(FLUX, tmp_path / "o.png", "--size", "big"), 2, "expected WIDTHxHEIGHT")
    assert not (tmp_path / "o.png").exists()


def test_a_gpu_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(generate(FLUX, tmp_path / "o.png", "--device", "cuda"), 6, "not on this machine")


def test_missing_parts_are_one_line(tmp_path):
    out = tmp_path / "d.gguf"
    assert call("quantize", FLUX, "-o", out, "-t", "q8_0").exit_code == 0
    (Path(__import__("os").environ["DIFFQUANT_CACHE"]) / "sources.json").unlink()
    refused(generate(out, tmp_path / "o.png"), 2, "has no vae", "--base")
    assert generate(out, tmp_path / "o.png", "--base", FLUX).exit_code == 0


def test_a_prompt_that_is_too_long_is_cut_and_said(tmp_path):
    prompt = "a small red circle " * 40
    result = call("generate", FLUX, "-p", prompt, "--steps", 1, "-o", tmp_path / "o.png")
    assert result.exit_code == 0
    assert "warning: the prompt was cut" in result.stderr


def test_a_lora_of_another_family_is_one_line(tmp_path):
    from safetensors.numpy import save_file

    down = np.zeros((4, 3072), np.float32)
    keys = {}
    for block in range(2):
        name = f"lora_unet_double_blocks_{block}_img_attn_qkv"
        keys[f"{name}.lora_down.weight"] = down
        keys[f"{name}.lora_up.weight"] = np.zeros((9216, 4), np.float32)
    save_file(keys, tmp_path / "flux-lora.safetensors")
    lora = f"{tmp_path / 'flux-lora.safetensors'}:0.8"
    refused(generate(SD15, tmp_path / "o.png", "--lora", lora), 4, "flux1", "sd15")
    refused(generate(SD15, tmp_path / "o.png", "--lora", "missing:x"), 2, "FILE:WEIGHT")


def test_an_existing_picture_is_not_replaced_without_force(tmp_path):
    out = tmp_path / "o.png"
    out.write_bytes(b"mine")
    refused(generate(SD15, out), 2, "--force")
    assert out.read_bytes() == b"mine"
    assert generate(SD15, out, "--force").exit_code == 0


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffquant.runtime.pipeline.Pipeline.generate", interrupt)
    result = generate(SD15, tmp_path / "o.png")
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_verify_prints_the_contract_and_exits_3_below_the_gate(tmp_path):
    out, prompts = tmp_path / "q.gguf", tmp_path / "prompts.txt"
    prompts.write_text(f"# one per line\n{DEMO_PROMPTS[0]}\n\n")
    assert call("quantize", FLUX, "-o", out, "-t", "q8_0", "--verify", "none").exit_code == 0
    options = ["--against", FLUX, "--prompts", prompts, "--seeds", "0", "--steps", 3, "--json"]
    result = call("verify", out, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["result"]
    assert {"level", "verdict", "load", "tensors", "image"} <= found.keys()
    assert found["tensors"]["worst"][0].keys() >= {"key", "error", "verdict"}
    assert found["image"].keys() >= {
        "psnr_db",
        "identical",
        "ssim",
        "noise_floor_psnr_db",
        "control_psnr_db",
        "pairs",
        "reference",
        "candidate",
    }
    assert len(found["image"]["pairs"]) == 1
    strict = call("verify", out, *options, "--min-psnr", 99)
    assert strict.exit_code == 3
    assert not json.loads(strict.stdout)["ok"]


def test_quantize_verifies_pictures_in_one_go(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(DEMO_PROMPTS[2])
    result = call(
        "quantize", FLUX, "-o", tmp_path / "q.safetensors", "-t", "int8_rowwise",
        "--verify", "image", "--prompts", prompts, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["result"]
    assert found["image"]["verdict"] == "pass"
    assert found["bits_per_weight"] < 16
