"""`inspect` on adapters and textual inversions: the screen, narrow and wide, and its JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink

ATTN = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2"


def write(path, tensors, metadata=None):
    kinds = {"<f4": "F32", "<f2": "F16"}
    specs = [TensorSpec(key, kinds[one.dtype.str], one.shape) for key, one in tensors.items()]
    with open_sink(path, specs, metadata or {}, force=True) as sink:
        for key, one in tensors.items():
            sink.write(key, 0, np.ascontiguousarray(one).reshape(-1).view(np.uint8))
        sink.commit()
    return path


@pytest.fixture
def lora(tmp_path):
    tensors = {}
    for name, columns in (("to_q", 320), ("to_k", 768)):
        tensors[f"{ATTN}_{name}.lora_down.weight"] = np.ones((4, columns), np.float16)
        tensors[f"{ATTN}_{name}.lora_up.weight"] = np.zeros((320, 4), np.float16)
    tags = {"10_ohwx cat": {f"tag number {n}": 100 - n for n in range(30)}}
    metadata = {"ss_tag_frequency": json.dumps(tags), "ss_steps": "900", "ss_v2": "True"}
    return write(tmp_path / "lcm-cat.safetensors", tensors, metadata)


@pytest.mark.parametrize("columns", [80, 140])
def test_the_screen_says_what_a_person_asks(command, lora, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = command("inspect", lora)
    assert ran.code == 0
    lines = ran.out.splitlines()[1:]
    assert max(map(len, lines)) <= columns
    told = {line[2:14].strip(): line[14:] for line in lines if line[2:14].strip()}
    assert told["for"] == "sd15"
    assert told["adapters"] == "2 LoRA"
    assert told["rank"] == "4"
    assert told["alpha"] == "not stated: taken to be the rank, scale 1"
    assert told["blocks"] == "down_blocks 0 (1 of 4)"
    assert told["trigger"] == "ohwx cat"
    assert told["hint"].startswith("its name says LCM-LoRA")
    assert "ss_v2 says True" in ran.err


def test_deep_names_zeros(command, lora):
    assert "\n  zero " not in command("inspect", lora).out
    ran = command("inspect", "--deep", lora)
    assert f"{ATTN}_to_" in ran.out
    assert "suspicious" in ran.out
    assert "every adapter is zero" in ran.err


def test_names_from_files_cannot_move_the_cursor(command, tmp_path):
    tensors = {"unet.\x1b[2Jx.lora_A.weight": np.ones((4, 8), np.float32)}
    ran = command("inspect", write(tmp_path / "a.safetensors", tensors))
    assert "malformed" in ran.out
    assert "\x1b" not in ran.out + ran.err


def test_json_holds_the_whole_report(command, lora):
    (file,) = command("inspect", "--json", lora).result["files"]
    assert (file["kind"], file["architecture"], file["layout"]) == ("lora", "sd15", "kohya")
    assert file["lora"]["ranks"] == {"4": 2}
    assert file["lora"]["training"]["steps"] == "900"
    assert file["inversion"] is None


def test_a_textual_inversion_is_shown_with_its_trigger(command, tmp_path):
    arrays = {"clip_l": np.ones((2, 768), np.float32), "clip_g": np.ones((2, 1280), np.float32)}
    ran = command("inspect", write(tmp_path / "style.safetensors", arrays))
    assert "for         sdxl (sd3 would fit as well)" in ran.out
    assert "trigger     style (by its file name)" in ran.out
