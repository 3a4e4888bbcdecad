"""`inspect --for NAME`, and who can load a file on its page."""

import pytest

from diffquant.inspect.loaders import LOADERS


def test_a_page_says_who_can_load_the_file(command, gguf_file):
    ran = command("inspect", gguf_file)
    assert ran.code == 0
    for name in LOADERS:
        assert f"    {name} " in ran.out
    assert "comfyui-gguf  yes, if  no vae, no text_encoder" in ran.out


@pytest.mark.parametrize("columns", ["60", "80", "140"])
def test_a_page_keeps_to_the_width_of_the_terminal(command, gguf_file, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    lines = command("inspect", gguf_file).out.splitlines()
    start = next(i for i, line in enumerate(lines) if "who can load it" in line)
    assert max(map(len, lines[start:])) <= int(columns)


def test_json_has_every_loader_with_reasons(command, gguf_file):
    found = command("inspect", "--json", gguf_file).result["files"][0]["loaders"]
    assert [one["loader"] for one in found] == list(LOADERS)
    for one in found:
        assert one["verdict"] in ("accepts", "caveat", "unknown", "refuses")
        assert {"rule", "verdict", "text", "source"} == set(one["reasons"][0])


def test_a_condition_is_a_warning_and_no_failure(command, gguf_file):
    ran = command("inspect", "--for", "comfyui-gguf", gguf_file)
    assert ran.code == 0
    assert "comfyui-gguf: yes, if" in ran.out
    assert "[comfyui-gguf.parts; city96/ComfyUI-GGUF@795e451" in ran.out
    assert "warning: " in ran.err
    assert "give the others" in ran.err


def test_one_refusal_among_several_files_is_exit_code_3(command, gguf_file, unet):
    ran = command("inspect", "--for", "comfyui-gguf", gguf_file, unet)
    assert ran.code == 3
    assert "comfyui-gguf: no" in ran.out
    assert "its nodes list .gguf files" in ran.out


def test_a_refusal_in_json_is_not_ok(command, unet):
    ran = command("inspect", "--json", "--for", "comfyui-gguf", unet)
    assert ran.code == 3
    assert ran.json["ok"] is False
    assert ran.json["result"]["for"] == "comfyui-gguf"
    assert ran.json["result"]["files"][str(unet)]["verdict"] == "refuses"


def test_an_unknown_program_is_exit_code_4_with_the_closest(command, unet):
    ran = command("inspect", "--for", "comfy-gguf", unet)
    assert ran.code == 4
    assert "did you mean 'comfyui-gguf'?" in ran.err


def test_an_unreadable_file_beside_others_is_named(command, gguf_file, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\3\0\0\0")
    ran = command("inspect", "--for", "diffquant", gguf_file, broken)
    assert ran.code == 1
    assert "broken.gguf" in ran.err
    assert "diffquant: yes, if" in ran.out


def test_nothing_known_is_a_warning(command, write_nothing):
    ran = command("inspect", "--for", "forge", write_nothing)
    assert ran.code == 0
    assert "forge: unknown" in ran.out
    assert "nothing is known" in ran.err


@pytest.fixture
def write_nothing(tmp_path):
    """A safetensors file of one tensor that is no model's."""
    import json
    import struct

    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path = tmp_path / "nothing.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    return path
