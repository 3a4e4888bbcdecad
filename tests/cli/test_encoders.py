"""Text encoders on the command line: a part of a pipeline, names ComfyUI-GGUF finds, back again."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
from safetensors import safe_open

# How ComfyUI-GGUF cuts a quant label off an encoder's name, and then wants it in the name of the
# image tower's file, beside "mmproj" (city96/ComfyUI-GGUF@795e451:loader.py:213-284).
_SUFFIX = re.compile(r"[-_]?(?:ud-)?i?q[0-9]_[a-z0-9_\-]{1,8}$", re.IGNORECASE)


def test_t5_of_a_pipeline_goes_to_gguf_and_back(command, examples, tmp_path):
    out, back = tmp_path / "t5-Q8_0.gguf", tmp_path / "t5.safetensors"
    args = ("quantize", examples / "flux1-shapes", "-o", out, "-t", "q8_0", "--json")
    result = command(*args, "--part", "text_encoder_2").result
    assert [part["name"] for part in result["parts"]] == ["text_encoder_2"]
    assert result["policy"] == "encoder"
    assert gguf.GGUFReader(out).fields["general.architecture"].contents() == "t5encoder"
    shown = command("inspect", out)
    assert "text_encoder · t5_encoder · gguf" in shown.out
    assert command("convert", out, "-o", back, "--dtype", "f16").code == 0
    source = examples / "flux1-shapes/text_encoder_2/model.safetensors"
    with safe_open(back, "np") as found, safe_open(source, "np") as expected:
        assert set(found.keys()) == set(expected.keys())


def test_default_names_of_encoder_and_image_tower_fit_comfyui_gguf(
    command, examples, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = {}
    for part, kind in (("text_encoder", "q8_0"), ("text_encoder", "q4_k_s"), ("mmproj", "f16")):
        args = ("quantize", examples / "qwen-image-shapes", "-t", kind, "--part", part, "--dry-run")
        names[part, kind] = Path(command(*args, "--json").result["output"]).stem.lower()
    tower = names.pop(("mmproj", "f16"))
    assert "mmproj" in tower
    for name in names.values():
        assert _SUFFIX.sub("", name) in tower
        assert _SUFFIX.sub("", name) != name


def test_clip_for_comfyui_gguf_is_refused_in_one_line(command, examples, tmp_path):
    args = ("quantize", examples / "flux1-shapes", "-o", tmp_path / "a.gguf", "-t", "q8_0")
    ran = command(*args, "--part", "text_encoder", "--target", "comfyui-gguf")
    assert ran.code == 1
    assert "give ComfyUI a .safetensors file" in ran.err
    assert not (tmp_path / "a.gguf").exists()
