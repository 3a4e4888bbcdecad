"""`quantize` and `convert` from the command line: contract, exit codes, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest

from diffquant.core.tensors import TensorSpec
from diffquant.io import open_sink, open_source

TOTAL = {"name", "tensors", "parameters", "nbytes", "bits_per_weight", "formats"}


@pytest.fixture
def flux(examples):
    return examples / "flux1-shapes"


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_quantize_keeps_its_json_contract(command, flux, tmp_path, dry):
    out = tmp_path / "flux.gguf"
    ran = command("quantize", flux, "-o", out, "-t", "q4_k_s", "--json", *dry)
    assert ran.code == 0
    body = ran.json
    assert set(body) == {"schema_version", "command", "ok", "warnings", "result"}
    assert (body["command"], body["ok"]) == ("quantize", True)
    result = body["result"]
    assert result["output"] == str(out)
    assert 4 < result["bits_per_weight"] < 16
    assert [set(part) for part in result["parts"]] == [TOTAL]
    assert sum(row["nbytes"] for row in result["tensors"]) == result["nbytes"]
    for row in result["tensors"]:
        assert all(isinstance(row[name], str) and row[name] for name in ("key", "stored", "reason"))
    assert out.exists() == (not dry)
    assert result["dry_run"] == bool(dry)
    if not dry:
        with open_source(out) as source:
            stored = {key: spec.dtype.lower() for key, spec in source.specs.items()}
        assert {row["target"]: row["stored"] for row in result["tensors"]} == stored


def test_text_names_every_format_and_reason_and_the_verdict(command, flux, tmp_path):
    out = tmp_path / "flux.gguf"
    ran = command("quantize", flux, "-o", out, "-t", "Q4_K_S")  # case as in llama-quantize
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"wrote {out}\n")
    assert "vector: high precision" in ran.out
    assert "verified (tensors): pass" in ran.out
    planned = command("quantize", flux, "-o", out, "-t", "q8_0", "--dry-run", "--force", "-v")
    assert planned.out.startswith(f"would write {out}\n")
    assert "single_blocks.0.linear1.weight" in planned.out


def test_a_part_alone_is_reported_with_its_bits_and_formats(command, flux, tmp_path):
    ran = command("convert", flux, "-o", tmp_path / "vae.safetensors", "--part", "vae")
    assert ran.code == 0
    assert "16.00 bits per weight" in ran.out
    assert "denoiser" not in ran.out
    assert "copied" in ran.out


def test_the_default_output_is_named_after_source_and_type(command, flux, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("quantize", flux, "-t", "q8_0", "-q").code == 0
    assert (tmp_path / "flux1-shapes-Q8_0.gguf").exists()


def test_threads_do_not_change_the_bytes(command, flux, tmp_path):
    for count in (1, 3):
        out = tmp_path / f"{count}.safetensors"
        args = ("-o", out, "-t", "fp8_scaled", "--threads", count)
        assert command("quantize", flux, *args).code == 0
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_target_and_policy_are_said_and_written(command, examples, tmp_path):
    out = tmp_path / "sd.gguf"
    args = ("quantize", examples / "sd15-shapes", "-o", out, "-t", "q4_k")  # short for q4_k_m
    planned = command(*args, "--dry-run")
    assert "for universal, policy published (the peers' mix)" in planned.out
    assert "convolutions stay f16; --target comfyui-gguf packs them as q4_k_m" in planned.out
    ran = command(*args, "--target", "comfyui-gguf", "--json")
    assert (ran.code, ran.json["warnings"]) == (0, [])
    result = ran.result
    assert (result["type"], result["target"], result["policy"]) == (
        "q4_k_m", "comfyui-gguf", "published",
    )  # fmt: skip
    assert result["bits_per_weight"] < 5.5
    with open_source(out) as source:
        assert source.metadata["diffquant.target"] == "comfyui-gguf"
        assert source.metadata["diffquant.policy"] == "published"
        assert source.metadata["general.file_type"] == 15
    pure = command(*args, "--pure", "--exclude", "emb_layers", "--dry-run", "--json").result
    assert pure["policy"] == "pure, user rules: 1"
    eight = command(*args[:-1], "q8_0", "--policy", "tuned", "--dry-run", "--json").result
    assert eight["notes"] or eight["policy"] == "tuned"


def test_user_rules_win_and_say_so(command, flux, tmp_path):
    args = ("-o", tmp_path / "a.gguf", "-t", "q4_k_s", "--json", "--dry-run")
    rules = ("--tensor-type", r"linear1\.weight=q8_0", "--exclude", "linear2", "--pure")
    rows = command("quantize", flux, *args, *rules).result["tensors"]
    found = {row["key"]: row for row in rows}
    assert found["single_blocks.0.linear1.weight"]["stored"] == "q8_0"
    assert (
        r"--tensor-type linear1\.weight=q8_0" in found["single_blocks.0.linear1.weight"]["reason"]
    )
    assert found["single_blocks.0.linear2.weight"]["stored"] == "bf16"
    assert found["single_blocks.0.linear2.weight"]["reason"].startswith("--exclude linear2")


def test_recipes_go_out_and_come_back(command, flux, tmp_path):
    a, b, recipe = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "a.recipe"
    rule = ("--tensor-type", r"linear1\.weight=q8_0")
    planned = command(
        "quantize", flux, "-o", a, "-t", "q4_k_s", *rule, "--emit-recipe", recipe, "--dry-run"
    )
    assert planned.code == 0
    assert not a.exists()
    text = recipe.read_text()
    assert "\ntype = q4_k_s\n" in text
    assert "\nq8_0  single_blocks.0.linear1.weight\n" in text
    assert command("quantize", flux, "-o", a, "-t", "q4_k_s", *rule).code == 0
    for origin in (recipe, a):
        ran = command("quantize", flux, "-o", b, "--recipe-from", origin, "--force")
        assert (ran.code, ran.err) == (0, "")
        with open_source(a) as first, open_source(b) as second:
            assert list(first.specs.items()) == list(second.specs.items())
            assert all(bytes(first.read(k)) == bytes(second.read(k)) for k in first.specs)
            assert second.metadata["diffquant.policy"] == "recipe"
    again = command(
        "quantize", flux, "-o", b, "--recipe-from", a, "--emit-recipe", recipe, "--force"
    )
    assert again.code == 0
    assert recipe.read_text() == text


RECIPES = {
    "neither type nor recipe": ([], 2, "give a type with -t"),
    "no such recipe": (["--recipe-from", "{}/none"], 1, "no such file"),
    "a recipe of something else": (["--recipe-from", "{}/file"], 4, "not a checkpoint"),
    "a recipe without a type": (["--recipe-from", "{}/bare"], 2, "give one with -t"),
    "of another model": (["--recipe-from", "{}/other"], 2, "a recipe of sd15"),
    "emitted over a file": (["-t", "q8_0", "--emit-recipe", "{}/file"], 2, "--force"),
    "emitted over the output": (["-t", "q8_0", "--emit-recipe", "{}/a.gguf"], 2, "another name"),
    "emitted over its own source": (
        ["--recipe-from", "{}/typed", "--emit-recipe", "{}/typed", "--force"],
        2,
        "another name",
    ),
    "emitted nowhere": (["-t", "q8_0", "--emit-recipe", "{}/no/x"], 2, "create it first"),
    "emitted over a folder": (["-t", "q8_0", "--emit-recipe", "{}"], 2, "is a folder"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_options_that_make_no_sense(command, flux, tmp_path, name):
    args, code, message = RECIPES[name]
    head, body = "# diffquant recipe 1\narchitecture = flux1\n", "[denoiser]\nq8_0 x\n"
    (tmp_path / "file").write_text("x")
    (tmp_path / "bare").write_text(head + body)
    (tmp_path / "typed").write_text(head + "type = q8_0\n" + body)
    (tmp_path / "other").write_text(head.replace("flux1", "sd15") + "type = q8_0\n" + body)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    filled = [text.format(tmp_path) for text in args]
    ran = command("quantize", flux, "-o", tmp_path / "a.gguf", *filled)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


REFUSED = {
    "unknown type": (["-t", "q4_k_x"], "a.gguf", 4, "did you mean 'q4_k_s'? (known: f32, bf16"),
    "unknown format": (["-t", "q8_0", "--tensor-type", "x=q9"], "a.gguf", 4, "unknown format 'q9'"),
    "no type given": (["-t", ""], "a.gguf", 4, "unknown type ''"),
    "type in a wrong container": (["-t", "nf4"], "a.gguf", 2, "nf4 cannot go into a .gguf file"),
    "scaled fp8 in a folder": (["-t", "fp8_scaled"], "a", 2, "write it to a .safetensors file"),
    "extension nobody writes": (["-t", "q8_0"], "a.ckpt", 2, "cannot write .ckpt"),
    "unknown target": (
        ["-t", "q8_0", "--target", "comfyu"],
        "a.gguf",
        4,
        "unknown target 'comfyu'",
    ),
    "target of another container": (
        ["-t", "q8_0", "--target", "comfyui"],
        "a.gguf",
        2,
        "target comfyui reads safetensors",
    ),
    "format its target cannot read": (
        ["-t", "q8_0", "--target", "universal", "--tensor-type", "img_attn.norm=bf16"],
        "a.gguf",
        1,
        "universal cannot read",
    ),
    "bad regex": (["-t", "q8_0", "--exclude", "("], "a.gguf", 2, "(: not a regular expression"),
    "bad rule": (["-t", "q8_0", "--tensor-type", "x"], "a.gguf", 2, "expected REGEX=FORMAT"),
    "bad regex in rule": (
        ["-t", "q8_0", "--tensor-type", "[=q8_0"],
        "a.gguf",
        2,
        "[: not a regular expression",
    ),
    "missing part": (["-t", "q8_0", "--part", "clip"], "a.gguf", 2, "no part clip"),
    "part gguf cannot hold": (["-t", "q8_0", "--part", "vae"], "a.gguf", 2, "no form for vae"),
    "no folder to write to": (["-t", "q8_0"], "no/where/a.gguf", 2, "create it first"),
    "a file for a parent": (["-t", "q8_0"], "file/a.gguf", 2, "create it first"),
    "existing output": (["-t", "q8_0"], "file.gguf", 2, "--force"),
    "directory that is no model": (["-t", "nf4", "--force"], "home", 2, "is no Diffusers folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_fail_are_one_line_and_leave_nothing(command, flux, tmp_path, name):
    args, target, code, message = REFUSED[name]
    (tmp_path / "file").write_text("x")
    (tmp_path / "file.gguf").write_text("precious")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    ran = command("quantize", flux, "-o", tmp_path / target, *args)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("diffquant quantize: ")
    assert ran.err.count("\n") == 1
    assert message in ran.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("name", ["quantize", "convert"])
def test_unknown_architectures_are_four(command, tmp_path, name):
    path = tmp_path / "odd.safetensors"
    with open_sink(path, [TensorSpec("odd.weight", "F32", (2, 2))], {}) as sink:
        sink.write("odd.weight", 0, np.zeros(16, np.uint8))
        sink.commit()
    kind = ["-t", "q8_0"] if name == "quantize" else []
    ran = command(name, path, "-o", tmp_path / "a.gguf", *kind, "--json")
    assert ran.code == 4
    assert "no known architecture has these 1 tensors" in ran.json["error"]["message"]
    assert ran.json["error"]["message"] in ran.err


@pytest.mark.parametrize("name", ["quantize", "convert"])
def test_a_missing_source_is_one(command, tmp_path, name):
    kind = ["-t", "q8_0"] if name == "quantize" else []
    ran = command(name, tmp_path / "gone", "-o", tmp_path / "a.gguf", *kind)
    assert (ran.code, ran.out) == (1, "")
    assert "no such file" in ran.err


def test_a_missing_base_is_one(command, unet, tmp_path):
    ran = command("convert", unet, "-o", tmp_path / "out", "--base", tmp_path / "gone")
    assert ran.code == 1
    assert str(tmp_path / "gone") in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["a.gguf", "a.safetensors", "a"])
def test_an_unwritable_folder_is_one(command, flux, tmp_path, monkeypatch, target):
    """By a refusing system call, since the super-user may write anywhere."""
    plain, mkdir = os.open, os.mkdir

    def refuse(path, *args, **kwargs):
        if ".partial-" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return (plain if args and args[0] & os.O_CREAT else mkdir)(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", lambda p, f, *a, **k: refuse(p, f, *a, **k)
                        if f & os.O_CREAT else plain(p, f, *a, **k))  # fmt: skip
    monkeypatch.setattr(os, "mkdir", refuse)
    ran = command("convert", flux, "-o", tmp_path / target)
    assert (ran.code, ran.out) == (1, "")
    assert str(tmp_path / target) in ran.err
    assert "Permission denied" in ran.err
    assert ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_is_six(command, flux, tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    ran = command("quantize", flux, "-o", tmp_path / "a.gguf", "-t", "q8_0")
    assert ran.code == 6
    assert "disk full" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_six_before_the_work(command, flux, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    ran = command("quantize", flux, "-o", tmp_path / "a.gguf", "-t", "q8_0")
    assert ran.code == 6
    assert "10 bytes are free" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_interrupts_are_130(command, flux, tmp_path, monkeypatch):
    from diffquant.io.atomic import FlatSink

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(FlatSink, "write", interrupted)
    ran = command("quantize", flux, "-o", tmp_path / "a.gguf", "-t", "q8_0")
    assert ran.code == 130
    hint = "(with --resume, a run can be continued)"
    assert ran.err == f"diffquant quantize: interrupted; nothing was left behind {hint}\n"
    assert list(tmp_path.iterdir()) == []


def test_already_quantized_sources_need_the_flag(command, gguf_file, tmp_path):
    args = ("quantize", gguf_file, "-o", tmp_path / "a.gguf", "-t", "q8_0")
    ran = command(*args)
    assert ran.code == 1
    assert "--allow-requantize" in ran.err
    assert not (tmp_path / "a.gguf").exists()
    again = command(*args, "--allow-requantize", "--json")
    assert again.code == 0
    assert "requantized from q4_k" in json.dumps(again.result["tensors"])


def test_a_weight_with_nan_is_named_and_nothing_written(command, examples, unet, tmp_path):
    path = tmp_path / "nan.safetensors"
    with open_source(unet) as source, open_sink(path, source.specs.values(), {}) as sink:
        for key in source.specs:
            data = source.read(key).copy()
            if key.endswith("attn1.to_q.weight"):
                data[10:12] = (0x00, 0x7E)  # NaN in float16
            sink.write(key, 0, data)
        sink.commit()
    ran = command("quantize", path, "-o", tmp_path / "a.gguf", "-t", "q8_0")
    assert (ran.code, ran.out) == (1, "")
    assert "attn1.to_q.weight: 1 values are NaN or infinite" in ran.err
    assert [one.name for one in tmp_path.iterdir()] == ["nan.safetensors"]


def test_mixed_outputs_warn_on_stderr_unless_quiet(command, examples, tmp_path):
    args = ("quantize", examples / "sd15-shapes", "-o", tmp_path / "a.gguf", "-t", "q6_k")
    ran = command(*args, "--dry-run")
    assert "warning: MIXED: only 23% of the denoiser's weights" in ran.err
    assert "warning" not in ran.out
    quiet = command(*args, "--dry-run", "-q")
    assert (quiet.err, quiet.out) == ("", ran.out)
    assert any("MIXED" in text for text in command(*args, "--dry-run", "--json").json["warnings"])


def test_convert_casts_and_says_what_is_missing(command, unet, tmp_path):
    out = tmp_path / "out"
    ran = command("convert", unet, "-o", out, "--dtype", "bf16")
    assert ran.code == 0
    assert "warning: missing from the folder: model_index.json" in ran.err
    with open_source(out) as source:
        assert {spec.dtype for spec in source.specs.values()} == {"BF16"}


@pytest.mark.parametrize("args", [("--dtype", "f8"), ("--threads", "0"), ("--frob",)])
def test_wrong_option_values_are_two(command, unet, tmp_path, args):
    ran = command("convert", unet, "-o", tmp_path / "a.gguf", *args)
    assert ran.code == 2
    assert ran.err.startswith("Usage: ")


def test_convert_takes_its_output_as_an_argument_too(command, unet, tmp_path):
    named = command("convert", unet, "-o", tmp_path / "a.safetensors", "--dtype", "bf16")
    plain = command("convert", unet, tmp_path / "b.safetensors", "--dtype", "bf16")
    assert (named.code, plain.code) == (0, 0)
    pair = [(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors")]
    assert pair[0] == pair[1]


@pytest.mark.parametrize("outputs", [(), ("b.safetensors", "-o", "a.safetensors")])
def test_convert_wants_one_output(command, unet, outputs):
    ran = command("convert", unet, *outputs)
    assert ran.code == 2
    assert "give one file or folder to write: as OUTPUT, or with -o" in ran.err
