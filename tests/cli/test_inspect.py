"""`inspect`: its JSON contract, and files made to break it."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink

FIELDS = {
    "path": str,
    "container": str,
    "kind": str,
    "architecture": str,
    "variant": str,
    "layout": str,
    "tensors": int,
    "parameters": int,
    "nbytes": int,
    "storage": dict,
    "parts": list,
}
ALL_FIELDS = {
    *FIELDS,
    *("title", "evidence", "leftovers", "candidates", "metadata", "warnings"),
    *("encodings", "loaders", "lora", "inversion"),
}
ALL_OF_PART = {"name", "kind", "layout", "tensors", "parameters", "nbytes", "formats"}
ALL_OF_ENCODING = {
    *("part", "format", "dialect", "called", "marker", "scale", "readable"),
    *("weights", "parameters", "example"),
}
PART = {"name": str, "tensors": int, "parameters": int, "nbytes": int}


def check_contract(body):
    assert set(body) == {"schema_version", "command", "ok", "warnings", "result"}
    assert (body["schema_version"], body["command"]) == (1, "inspect")
    assert isinstance(body["warnings"], list)
    for file in body["result"]["files"]:
        for name, kind in FIELDS.items():
            assert type(file[name]) is kind, name
        assert set(file) == ALL_FIELDS  # docs/inspect.md says that fields are only ever added
        for row in file["encodings"]:
            assert set(row) == ALL_OF_ENCODING
        for row in file["loaders"]:
            assert set(row) == {"loader", "verdict", "reasons"}
        for row in file["storage"].values():
            assert set(row) == {"tensors", "nbytes"}
        assert sum(row["tensors"] for row in file["storage"].values()) == file["tensors"]
        assert sum(row["nbytes"] for row in file["storage"].values()) == file["nbytes"]
        for part in file["parts"]:
            assert set(part) == ALL_OF_PART
            for name, kind in PART.items():
                assert type(part[name]) is kind, name


@pytest.mark.parametrize(
    ("model", "architecture", "parts"),
    [
        ("sd15-shapes", "sd15", ["denoiser", "vae", "text_encoder"]),
        ("sdxl-shapes", "sdxl", ["denoiser", "vae", "text_encoder", "text_encoder_2"]),
        ("flux1-shapes", "flux1", ["denoiser", "vae", "text_encoder", "text_encoder_2"]),
        ("qwen-image-shapes", "qwen_image", ["denoiser", "vae", "text_encoder"]),
    ],
)
def test_folders_are_described_as_the_contract_says(command, examples, model, architecture, parts):
    ran = command("inspect", "--json", examples / model)
    assert (ran.code, ran.err) == (0, "")
    check_contract(ran.json)
    (file,) = ran.result["files"]
    assert file["path"] == str(examples / model)
    assert (file["container"], file["kind"]) == ("diffusers_folder", "checkpoint")
    assert (file["architecture"], file["layout"]) == (architecture, "diffusers")
    assert [part["name"] for part in file["parts"]] == parts
    assert sum(part["parameters"] for part in file["parts"]) == file["parameters"]
    assert sum(part["nbytes"] for part in file["parts"]) == file["nbytes"]


def test_a_gguf_file_is_described_by_its_true_shapes(command, gguf_file):
    ran = command("inspect", "--json", gguf_file)
    check_contract(ran.json)
    (file,) = ran.result["files"]
    assert (file["container"], file["architecture"]) == ("gguf", "flux1")
    assert {"Q4_K", "F32"} <= set(file["storage"])
    assert file["parts"][0]["formats"]["q4_k"] > file["parameters"] / 2


def test_parts_found_alone_are_named(command, examples):
    for folder, kind in (("vae", "vae"), ("text_encoder", "text_encoder")):
        (file,) = command("inspect", "--json", examples / "sd15-shapes" / folder).result["files"]
        assert file["kind"] == kind


def test_text_shows_the_same_facts(command, unet):
    ran = command("inspect", unet)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[0] == str(unet)
    assert "diffusion_model · sd15" in ran.out
    assert "438 tensors" in ran.out
    explained = command("inspect", "--explain", unet)
    assert "evidence: " in explained.out


def test_unknown_files_are_no_error(command, tmp_path):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(safetensors({"a": ("F32", [2], 0, 8)}, 8))
    ran = command("inspect", "--json", path)
    assert ran.code == 0
    check_contract(ran.json)
    assert ran.result["files"][0]["kind"] == "unknown"
    assert ran.result["files"][0]["architecture"] == "unknown"


@pytest.mark.parametrize("name", ["model.ckpt", "model.gguf", "model", "model.txt"])
def test_names_do_not_matter(command, tmp_path, unet, name):
    path = tmp_path / name
    path.symlink_to(unet)
    (file,) = command("inspect", "--json", path).result["files"]
    assert (file["container"], file["architecture"]) == ("safetensors", "sd15")


def safetensors(entries, nbytes, extra=b""):
    header = {
        key: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        for key, (dtype, shape, begin, end) in entries.items()
    }
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(nbytes) + extra


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch EXECUTED",)


def missing(folder, _):
    return folder / "missing.safetensors"


def empty_folder(folder, _):
    (folder / "empty").mkdir()
    return folder / "empty"


def empty_file(folder, _):
    (folder / "empty.safetensors").write_bytes(b"")
    return folder / "empty.safetensors"


def written(name, data):
    def make(folder, _):
        (folder / name).write_bytes(data)
        return folder / name

    return make


def cut(name, keep):
    def make(folder, gguf_file):
        data = (
            gguf_file.read_bytes()
            if name.endswith("gguf")
            else safetensors({"a": ("F32", [4], 0, 16)}, 16)
        )
        (folder / name).write_bytes(data[: keep(len(data))])
        return folder / name

    return make


DEEP = b"[" * 200_000
HOSTILE = {
    "missing": (missing, 1, "no such file"),
    "empty folder": (empty_folder, 1, "no checkpoint in this folder"),
    "empty file": (empty_file, 1, ""),
    "cut data": (cut("a.safetensors", lambda n: n - 1), 1, "bytes expected"),
    "cut header": (cut("a.safetensors", lambda n: 20), 1, "download it again"),
    "cut gguf data": (cut("a.gguf", lambda n: n - 1), 1, "a.gguf"),
    "cut gguf header": (cut("a.gguf", lambda n: 100), 1, "a.gguf"),
    "cut gguf magic": (cut("a.gguf", lambda n: 5), 1, "a.gguf"),
    "overlap": (
        written(
            "a.safetensors",
            safetensors({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 4, 12)}, 12),
        ),
        1,
        "overlaps",
    ),
    "gap": (
        written(
            "a.safetensors",
            safetensors({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 12, 20)}, 20),
        ),
        1,
        "gap",
    ),
    "trailing bytes": (
        written("a.safetensors", safetensors({"a": ("F32", [2], 0, 8)}, 8, b"x")),
        1,
        "after the last tensor",
    ),
    "oversized header": (
        written("a.safetensors", struct.pack("<Q", 2**40) + b"{}"),
        1,
        "header length 1099511627776",
    ),
    "deep header": (
        written("a.safetensors", len(DEEP).to_bytes(8, "little") + b'{"a":' + DEEP[:-5]),
        1,
        "not valid JSON",
    ),
    "huge shape": (
        written("a.safetensors", safetensors({"a": ("F32", [2**40, 2**40], 0, 8)}, 8)),
        1,
        "too large",
    ),
    "huge gguf counts": (
        written("a.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)),
        1,
        "a.gguf",
    ),
    "web page": (written("a.safetensors", b"<!DOCTYPE html><html>"), 4, "web page"),
    "lfs pointer": (
        written("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 99),
        4,
        "git lfs pull",
    ),
    "text": (written("a.txt", b"hello, this is a text file"), 4, "not a checkpoint"),
    "evil pickle": (written("a.ckpt", pickle.dumps({"w": Evil()}, 2)), 5, "system"),
    "evil marker": (
        written(
            "a.safetensors",
            (lambda raw: len(raw).to_bytes(8, "little") + raw + b"[" * 4000)(
                json.dumps(
                    {
                        "l.comfy_quant": {
                            "dtype": "U8",
                            "shape": [4000],
                            "data_offsets": [0, 4000],
                        }
                    }
                ).encode()
            ),
        ),
        1,
        "l.comfy_quant: not JSON",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_files_are_one_line_and_a_code(command, tmp_path, gguf_file, monkeypatch, name):
    make, code, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path, gguf_file)
    ran = command("inspect", path)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("diffquant inspect: ")
    assert ran.err.count("\n") == 1
    assert message in ran.err
    assert str(path) in ran.err
    assert not (tmp_path / "EXECUTED").exists()
    again = command("inspect", "--json", path)
    assert (again.code, again.err) == (code, ran.err)
    assert again.json["ok"] is False
    assert again.json["result"] is None
    assert again.json["error"]["exit_code"] == code


def test_an_evil_pickle_is_named_and_not_run(command, tmp_path, monkeypatch):
    """In a zip as torch writes it, too; `ok` alone would be harmless."""
    import zipfile

    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"state_dict": Evil()}, 2))
        file.writestr("archive/version", "3\n")
    ran = command("inspect", "a.pt")
    assert ran.code == 5
    assert "posix.system" in ran.err or "nt.system" in ran.err
    assert not (tmp_path / "EXECUTED").exists()


def test_one_broken_file_does_not_hide_the_others(command, tmp_path, unet, gguf_file):
    evil = tmp_path / "evil.ckpt"
    evil.write_bytes(pickle.dumps(Evil(), 2))
    gone = tmp_path / "gone.gguf"
    for flags in ([], ["-q"]):
        ran = command("inspect", *flags, gone, unet, evil, gguf_file)
        assert ran.code == 5  # the worst
        kinds = [line.split() for line in ran.out.splitlines()[2:6]]
        assert [("unreadable" in row, "model" in row) for row in kinds] == [
            (True, False),
            (False, True),
            (True, False),
            (False, True),
        ]
        lines = ran.err.splitlines()
        assert len(lines) == 2  # quiet or not: errors are errors
        assert str(gone) in lines[0]
        assert str(evil) in lines[1]
    ran = command("inspect", "--json", gone, unet)
    assert ran.code == 1
    assert ran.json["ok"] is False
    assert [file["path"] for file in ran.json["result"]["files"]] == [str(unet)]
    assert str(gone) in ran.json["warnings"][0]


def test_warnings_are_silent_when_quiet(command, tmp_path):
    path = tmp_path / "a.safetensors"
    specs = [TensorSpec("l.weight", "F8_E4M3", (2, 2)), TensorSpec("l.scale_weight", "F32", ())]
    with open_sink(path, specs, {}) as sink:
        sink.write("l.weight", 0, np.zeros(4, np.uint8))
        sink.write("l.scale_weight", 0, np.ones(1, np.float32).view(np.uint8))
        sink.commit()
    loud, quiet = command("inspect", path), command("inspect", "-q", path)
    assert loud.err == f"warning: {path}: l.weight: scale without a marker; it is applied\n"
    assert (quiet.code, quiet.err, quiet.out) == (0, "", loud.out)


def test_debug_shows_the_traceback(command, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from diffquant.cli.main import cli

    for env, flags in (({"DIFFQUANT_DEBUG": "1"}, []), ({}, ["-v", "-v"])):
        args = ["inspect", *flags, str(tmp_path / "gone")]
        ran = CliRunner().invoke(cli, args, env=env)
        assert ran.exit_code == 1
        assert "Traceback" in ran.stderr
        assert ran.stdout == ""


@pytest.mark.parametrize(
    "config", ["{", "3", '{"configs": 3}', '{"configs": {"unet/config.json": 3}}', "[" * 10**5]
)
def test_a_damaged_config_in_a_header_is_passed_over(command, tmp_path, unet, config):
    from diffquant.io import open_source

    path = tmp_path / "a.safetensors"
    with open_source(unet) as source:
        metadata = {"diffquant.config": config}
        with open_sink(path, source.specs.values(), metadata) as sink:
            for key in source.specs:
                sink.write(key, 0, source.read(key))
            sink.commit()
    (file,) = command("inspect", "--json", path).result["files"]
    assert file["architecture"] == "sd15"


def test_escape_sequences_in_a_file_do_not_reach_the_terminal(command, tmp_path):
    """`command` asserts that no escape is printed; nothing breaks an error into two lines."""
    header = {
        "__metadata__": {"note\x1b[2J": "gone\x1b[2J\x9b1m"},
        "a\x1b[31m\nb.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    ran = command("inspect", "--explain", path)
    assert r"note\x1b[2J = gone\x1b[2J\x9b1m" in ran.out
    header["c"] = {"dtype": "F32\n\x1b[2J", "shape": [1], "data_offsets": [4, 8]}
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    ran = command("inspect", path)
    assert ran.code == 1
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("columns", [80, 140])
def test_lines_and_pages_keep_to_the_width(command, examples, tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    folders = sorted(one for one in examples.iterdir() if (one / "model_index.json").exists())
    for ran in (command("inspect", *folders), command("inspect", folders[0])):
        assert ran.code == 0
        assert all(len(line) <= columns for line in ran.out.splitlines())
    assert ("container" in command("inspect", *folders).out) is (columns == 140)


def test_many_files_are_told_apart_by_what_their_paths_differ_in(command, examples):
    ran = command("inspect", *sorted(examples.glob("*/vae")))
    assert "sd15-shapes/vae " in ran.out
    assert ran.out.splitlines()[-1].startswith("4 files · ")
    assert ran.out.splitlines()[-1].endswith("examples")


def test_the_page_of_the_documentation_lists_every_field():
    text = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", text))
    assert named >= ALL_FIELDS | ALL_OF_PART | ALL_OF_ENCODING


def test_bars_are_ascii_where_stdout_is(examples):
    ran = subprocess.run(
        [sys.executable, "-m", "diffquant", "inspect", str(examples / "sd15-shapes")],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
        capture_output=True,
        check=True,
    )
    assert b"####" in ran.stdout
    assert b"|- " in ran.stdout or b"|-" in ran.stdout
