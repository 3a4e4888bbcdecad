"""`lora merge`, and `--lora` of quantize and convert: values, screens, exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

SD15 = str(Path(__file__).parents[2] / "examples/sd15-shapes")
NAME = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def lora(tmp_path):
    config = json.loads((Path(SD15) / "unet/config.json").read_text())
    width = config["block_out_channels"][-1]
    tensors = {
        f"{NAME}.lora_down.weight": np.full((2, width), 0.1, np.float32),
        f"{NAME}.lora_up.weight": np.full((width, 2), 0.1, np.float32),
    }
    path = tmp_path / "lcm_style.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "words",
    [
        ("lora", "merge", SD15, "{lora}:0.5", "-o", "{out}.safetensors"),
        ("lora", "merge", SD15, "{lora}:0.5", "-o", "{out}.gguf", "-t", "q8_0"),
        ("quantize", SD15, "--lora", "{lora}:0.5", "-o", "{out}.gguf", "-t", "q8_0"),
        ("convert", SD15, "--lora", "{lora}:0.5", "-o", "{out}.safetensors"),
    ],
)
def test_every_way_to_merge_reports_the_file(words, command, lora, tmp_path):
    ran = command(*(one.format(lora=lora, out=tmp_path / "out") for one in words), "--json")
    assert ran.code == 0, ran.err
    [row] = json.loads(ran.out)["result"]["merged"]["loras"]
    assert (row["weight"], row["written"], row["kinds"]) == (0.5, 1, {"LoRA": 1})
    assert row["recipe"].startswith("LCM-LoRA: weight 1, 4 to 8 steps")


def test_the_screen_says_layers_change_and_recipe(command, lora, tmp_path):
    ran = command("lora", "merge", SD15, f"{lora}", "-o", str(tmp_path / "out.safetensors"))
    assert "merged lcm_style.safetensors at 1: 1 layers (1 LoRA)" in ran.out
    assert "largest change: " in ran.out
    assert "LCM-LoRA: weight 1" in ran.out


def test_layers_that_do_not_fit_exit_4_and_write_nothing(command, lora, tmp_path):
    flux, out = SD15.replace("sd15", "flux1"), tmp_path / "out.safetensors"
    ran = command("lora", "merge", flux, str(lora), "-o", str(out))
    assert ran.code == 4
    assert "none of its 1 layers fits this flux1 base" in ran.err
    assert not out.exists()


def test_several_types_are_merged_in_one_pass_with_the_bytes_of_single_runs(
    command, lora, tmp_path
):
    types = ("q8_0", "q4_0", "fp8_scaled")
    words = [word for name in types for word in ("-t", name)]
    ran = command("lora", "merge", SD15, f"{lora}:0.5", "-o", f"{tmp_path}/out/", *words, "--json")
    assert ran.code == 0, ran.err
    outputs = json.loads(ran.out)["result"]["outputs"]
    assert [len(one["merged"]["loras"]) for one in outputs] == [1, 1, 1]
    for one, name in zip(outputs, types, strict=True):
        made = Path(one["output"])
        alone = tmp_path / f"alone-{made.name}"
        ran = command("lora", "merge", SD15, f"{lora}:0.5", "-o", str(alone), "-t", name)
        assert ran.code == 0, ran.err
        assert made.read_bytes() == alone.read_bytes()
    shown = command("lora", "merge", SD15, str(lora), "-o", f"{tmp_path}/more/", *words)
    assert "merged lcm_style.safetensors at 1" in shown.out


def test_several_types_need_several_names(command, lora, tmp_path):
    out = str(tmp_path / "one.gguf")
    ran = command("lora", "merge", SD15, str(lora), "-o", out, "-t", "q8_0", "-t", "q4_0")
    assert ran.code == 2
    assert "2 types make 2 files" in ran.err
