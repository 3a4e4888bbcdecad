"""Parameters read back: ours, A1111's, ComfyUI's; hostile PNGs and hostile texts."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffquant.core.errors import CheckpointError, MalformedFile, UsageError
from diffquant.runtime.comfy_prompt import from_comfy
from diffquant.runtime.infotext import from_infotext, to_infotext
from diffquant.runtime.parameters import from_parameters, save_png
from diffquant.runtime.recipe import UsedLora
from diffquant.runtime.repeat import read_recipe

SIGNATURE = b"\x89PNG\r\n\x1a\n"
FACTS = {
    "version": 1,
    "prompt": "a fox, (red:1.2)\nin snow — 雪",
    "negative": "blurry: yes, bad",
    "seed": 7,
    "steps": 12,
    "cfg": 5.5,
    "size": [64, 96],
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "rng": "cpu",
    "clip_skip": 2,
    "model": "some, model",
    "fingerprint": "ab" * 32,
    "loras": [{"name": "style", "weight": 0.8, "hash": "cd" * 32}],
    "refiner": {"name": "second", "hash": "ef" * 32, "switch": 0.7},
    "hires": {"factor": 1.5, "strength": 0.4, "name": "", "hash": ""},
    "image": {"name": "in.png", "hash": "12" * 32},
    "strength": 0.6,
    "versions": {"diffquant": "0.1.0", "torch": "2"},
}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(tmp_path, *chunks, end=True):
    path = tmp_path / "in.png"
    path.write_bytes(SIGNATURE + b"".join(chunks) + (chunk(b"IEND", b"") if end else b""))
    return path


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "out.png"
    save_png(path, np.zeros((8, 8, 3), np.float32), FACTS)
    found = read_recipe(path)
    assert found.origin == "diffquant"
    for key in ("prompt", "negative", "seed", "steps", "cfg", "sampler", "schedule", "clip_skip"):
        assert found.fields[key] == FACTS[key]
    assert found.fields["size"] == (64, 96)
    assert found.fields["refiner_switch"] == 0.7
    assert (found.fields["hires"], found.fields["hires_strength"]) == (1.5, 0.4)
    assert found.files == {"image": ("in.png", "12" * 32), "refiner": ("second", "ef" * 32)}
    assert found.loras == (UsedLora("style", 0.8, "cd" * 32),)
    assert Image.open(path).text["parameters"].startswith(FACTS["prompt"])


def test_our_a1111_text_reads_back_as_they_read_it():
    text = to_infotext(FACTS)
    last = text.splitlines()[-1]
    assert "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 7" in last
    assert 'Model: "some, model"' in last
    found = from_infotext(text, "x")
    assert found.fields["prompt"] == FACTS["prompt"]
    assert found.fields["negative"] == FACTS["negative"]
    assert (found.fields["sampler"], found.fields["schedule"]) == ("DPM++ 2M", "Karras")
    assert found.fields["size"] == (64, 96)
    assert found.fields["rng"] == "cpu"
    assert found.loras == (UsedLora("style", 0.8),)
    assert found.model == "some, model"


def test_a1111_and_forge_texts_are_understood():
    text = (
        "masterpiece, <lora:add detail:0.65> 1girl, <lora:other> <hypernet:x:1>\r\n"
        "second line\nNegative prompt: bad hands,\nworse: feet\n"
        'Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 4294967295, Size: 512x768, '
        'Model hash: 6ce0161689, Model: v1-5-pruned, Denoising strength: 0.4, Clip skip: 2, '
        'ENSD: 31337, Hires upscale: 1.5, Hires upscaler: Latent, '
        'Lora hashes: "add detail: 7c6bad76eb54, other: 0123", Version: v1.6.0'
    )  # fmt: skip
    found = from_infotext(text, "x")
    assert found.fields["prompt"] == "masterpiece,  1girl,  \nsecond line"
    assert found.fields["negative"] == "bad hands,\nworse: feet"
    assert found.fields["sampler"] == "DPM++ 2M Karras"
    assert found.fields["seed"] == 4294967295
    assert found.fields["rng"] == "philox"  # what A1111 draws unless it says otherwise
    assert (found.fields["hires"], found.fields["hires_strength"]) == (1.5, 0.4)
    assert "strength" not in found.fields
    assert found.loras == (UsedLora("add detail", 0.65), UsedLora("other", 1.0))
    assert [note for note in found.notes if "hypernet" in note]
    assert [note for note in found.notes if "ENSD: 31337 is not used" in note]


def test_a_text_without_parameters_is_a_prompt():
    found = from_infotext("only a prompt, with: a colon", "x")
    assert found.fields["prompt"] == "only a prompt, with: a colon"
    assert "rng" not in found.fields


def test_numbers_that_are_none_are_malformed():
    line = "a\nSteps: many, Sampler: Euler a, Seed: 1"
    with pytest.raises(MalformedFile, match="Steps: 'many'"):
        from_infotext(line, "x")
    with pytest.raises(MalformedFile, match="Size: '5x'"):
        from_infotext("a\nSteps: 1, Sampler: x, Size: 5x", "x")


def test_hostile_infotexts_end_soon():
    for text in ("<lora:" * 100_000, '"' * 200_000, "a: " * 200_000, "x, " * 200_000 + "a: 1"):
        assert from_infotext(text, "x").origin == "a1111"
    with pytest.raises(MalformedFile, match="characters"):
        from_infotext("x" * (1 << 21), "x")


GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 5, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal",
            "denoise": 1, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fox", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {"lora_name": "s.safetensors", "strength_model": 0.5, "model": ["4", 0]},
    },
}  # fmt: skip


def changed(**nodes):
    return json.dumps({**GRAPH, **nodes})


def test_comfys_simple_graph_is_read():
    found = from_comfy(json.dumps(GRAPH), "x")
    assert found.fields == {
        "prompt": "a fox", "negative": "blurry", "seed": 5, "steps": 20, "cfg": 8.0,
        "sampler": "euler", "schedule": "normal", "size": (512, 768), "rng": "cpu",
        "prompt_style": "comfy",
    }  # fmt: skip
    assert found.model == "sd15.safetensors"
    assert found.loras == (UsedLora("s.safetensors", 0.5),)
    assert found.notes == ()


def test_what_comfys_graph_does_not_say_is_said():
    found = from_comfy(
        changed(**{"6": {"class_type": "ConditioningCombine", "inputs": {}}, "10": GRAPH["7"]}),
        "x",
    )
    assert "prompt" not in found.fields
    assert any("prompt does not come from one CLIPTextEncode" in note for note in found.notes)
    assert any("CLIPTextEncode before the sampler" in note for note in found.notes)
    looped = {**GRAPH["10"], "inputs": {**GRAPH["10"]["inputs"], "model": ["10", 0]}}
    assert from_comfy(changed(**{"10": looped}), "x").model == ""
    with pytest.raises(UsageError, match=r"2 KSampler nodes.*give the options"):
        from_comfy(changed(**{"11": GRAPH["3"]}), "x")
    for text in ("{", "[]", '{"1": 2}', '{"1": {"class_type": 1, "inputs": {}}}', "[" * 100_000):
        with pytest.raises(MalformedFile):
            from_comfy(text, "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": "many"},
        {"steps": True},
        {"seed": 1.5},
        {"cfg": 1e300},
        {"size": [1]},
        {"size": [1, "2"]},
        {"prompt": 3},
        {"loras": {}},
        {"loras": [1]},
        {"loras": [{"name": "x"}]},
        {"refiner": "x"},
        {"image": {"name": 3}},
        {"version": 2},
        {"version": "1"},
    ],
)
def test_hostile_parameters_are_malformed_files(changes):
    with pytest.raises(MalformedFile):
        from_parameters(json.dumps({**FACTS, **changes}), "x")


@pytest.mark.parametrize("text", ["", "{", "[]", "NaN", "[" * 100_000])
def test_parameters_that_are_no_object_are_malformed_files(text):
    with pytest.raises(MalformedFile):
        from_parameters(text, "x")


def test_texts_of_every_chunk_are_read(tmp_path):
    text = b"a fox"
    for data in (
        chunk(b"tEXt", b"parameters\0" + text),
        chunk(b"zTXt", b"parameters\0\0" + zlib.compress(text)),
        chunk(b"iTXt", b"parameters\0\0\0\0\0" + text),
        chunk(b"iTXt", b"parameters\0\1\0en\0word\0" + zlib.compress(text)),
    ):
        assert read_recipe(png(tmp_path, data)).fields["prompt"] == "a fox"


def test_pil_reads_the_same_texts(tmp_path):
    info = PngInfo()
    info.add_text("parameters", "é fox", zip=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    assert (
        read_recipe(tmp_path / "a.png").fields["prompt"]
        == Image.open(tmp_path / "a.png").text["parameters"]
    )


def test_hostile_pngs_are_refused(tmp_path):
    bomb = zlib.compress(b"x" * (64 << 20))
    for data, message in (
        (chunk(b"zTXt", b"parameters\0\0" + bomb), "a text of over"),
        (chunk(b"zTXt", b"parameters\0\0garbage"), "damaged"),
        (chunk(b"iTXt", b"parameters\0\0\0\0\0\xff"), "not UTF-8"),
        (chunk(b"tEXt", b"parameters\0x")[:-1] + b"x", "CRC"),
        (struct.pack(">I4s", 2**32 - 1, b"tEXt"), "runs past the end"),
        (chunk(b"tEXt", b"parameters\0" + b"x" * (5 << 20)), "a text of"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_recipe(png(tmp_path, data))
    with pytest.raises(CheckpointError, match="ends without"):
        read_recipe(png(tmp_path, end=False))
    with pytest.raises(UsageError, match="carries no parameters"):
        read_recipe(png(tmp_path))
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UsageError, match="not a PNG"):
        read_recipe(tmp_path / "text.png")
    with pytest.raises(UsageError, match="no such picture"):
        read_recipe(tmp_path / "nowhere.png")
