"""`quantize --max-size`, `--bpw`, `--vram`: what is written, how it is called, what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from diffquant.convert.jobs import opened
from diffquant.convert.output import fingerprint
from diffquant.convert.sensitivity import (
    Sensitivity,
    cache_path,
    keep_sensitivity,
    write_sensitivity,
)
from diffquant.io import open_source
from diffquant.io.quant_label import quant_label


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Work in an empty folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def flux(examples):
    return examples / "flux1-shapes"


def test_a_file_of_that_size_is_named_by_its_bits_and_as_the_hub_reads_it(command, flux, here):
    ran = command("quantize", flux, "--max-size", "2.9MB", "--json")
    assert ran.code == 0, ran.err
    (file,) = here.iterdir()
    found = ran.result["allocation"]
    assert file.stat().st_size == found["nbytes"] <= 2_900_000
    assert file.stat().st_size >= 0.99 * 2_900_000
    most = max(found["formats"], key=lambda name: found["formats"][name])
    assert file.name.startswith(f"flux1-shapes-{found['bits_per_weight']:.2f}bpw-")
    assert quant_label(file.name) == most.upper()
    assert file.name == Path(ran.result["output"]).name
    with open_source(file) as source:
        header = source.metadata
    assert header["diffquant.policy"] == "allocated"
    assert header["diffquant.type"] == f"{found['bits_per_weight']:.2f}bpw"
    assert header["diffquant.allocation"].startswith("--max-size 2.9MB; among: q2_k, ")
    assert "sensitivity: weights of " in header["diffquant.allocation"]
    assert str(flux) not in json.dumps(dict(header), default=str)


def test_the_recipe_of_a_mix_makes_the_same_tensors(command, flux, here, digest_tensors):
    made = command("quantize", flux, "-o", "a.gguf", "--bpw", 6, "--emit-recipe", "r.txt", "--json")
    assert made.code == 0, made.err
    again = command("quantize", flux, "-o", "b.gguf", "--recipe-from", "r.txt", "--json")
    assert again.code == 0, again.err
    assert digest_tensors("a.gguf") == digest_tensors("b.gguf")
    assert not any("recipe" in text for text in again.json["warnings"])


@pytest.fixture
def digest_tensors():
    def of(path):
        with open_source(path) as source:
            return {key: source.read(key).tobytes() for key in source.specs}

    return of


def test_an_interrupted_run_is_continued_to_the_same_bytes(command, flux, here, monkeypatch):
    words = ("quantize", flux, "-o", "a.gguf", "--max-size", "3MB")
    assert command(*words, "--threads", 1).code == 0
    whole = Path("a.gguf").read_bytes()
    Path("a.gguf").unlink()
    from diffquant.convert import engine

    write, left = engine.write_chunk, [20]

    def broken(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(engine, "write_chunk", broken)
    assert command(*words, "--threads", 1, "--resume").code == 130
    assert not Path("a.gguf").exists()
    monkeypatch.setattr(engine, "write_chunk", write)
    ran = command(*words, "--resume", "--json")
    assert ran.result["continued"] > 0
    assert Path("a.gguf").read_bytes() == whole


def test_a_dry_run_shows_the_curve_and_reasons_and_writes_nothing(command, flux, here):
    ran = command("quantize", flux, "--bpw", 5.5, "--dry-run", "--explain")
    assert ran.code == 0
    assert not list(here.iterdir())
    assert "least predicted error" in ran.out
    assert "best mix of its size" in ran.out
    assert "q4_k_m" in ran.out
    assert "errors from weights alone" in ran.out
    (row,) = (x for x in ran.out.splitlines() if "single_blocks.0.linear1.weight" in x)
    assert ": saves " in row
    assert ": costs " in row


def test_safetensors_formats_choose_the_container(command, flux, here):
    words = ("quantize", flux, "--bpw", 10, "--among", "fp8_scaled,int8_rowwise,bf16", "--json")
    ran = command(*words)
    assert ran.code == 0, ran.err
    (file,) = here.iterdir()
    assert file.suffix == ".safetensors"
    assert "_" in file.stem.removeprefix("flux1-shapes")
    stored = {row["stored"] for row in ran.result["tensors"] if "allocated" in row["reason"]}
    assert stored <= {"fp8_e4m3_scaled", "int8_rowwise", "bf16"}
    assert len(stored) > 1


def test_a_placeholder_is_filled_with_bits_and_formats(command, flux, here):
    ran = command("quantize", flux, "-o", "x-{type}.gguf", "--bpw", 6, "--dry-run", "--json")
    assert re.fullmatch(r"x-[56]\.\d\dbpw-\d+Q\d_K-\d+Q\d_K\.gguf", ran.result["output"])


def test_a_sensitivity_of_this_source_is_found_and_another_is_not(command, flux, here):
    with opened(flux) as (source, _, _match):
        mark = fingerprint(source)
    first = command("quantize", flux, "--bpw", 6, "--dry-run", "--json").result["allocation"]
    assert first["method"] == "weights"
    errors = {one["key"]: {"q4_k": 1.0, "q8_0": 0.5} for one in first["tensors"]}
    for name, method in (("b" * 64, "weights"), (mark, "outputs")):
        path = cache_path(mark)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sensitivity(path, Sensitivity("flux1", "outputs", "u", name, errors, {}))
        found = command("quantize", flux, "--bpw", 7, "--dry-run", "--json").result["allocation"]
        assert found["method"] == method
        assert any("another checkpoint" in text for text in found["notes"]) is (name != mark)


@pytest.mark.slow
def test_pictures_judge_an_allocated_file(command, flux, here):
    Path("p.txt").write_text("a red circle\n")
    ran = command(
        "quantize", flux, "-o", "a.gguf", "--bpw", 9, "--verify", "image", "--prompts", "p.txt",
        "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.result["image"]["verdict"] == "pass"
    assert ran.result["allocation"]["method"] == "weights"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-size", "3MB", "--bpw", 5), "two budgets: give one"),
        (("--max-size", "3MB", "-t", "q4_k_s"), "both choose formats"),
        (("--bpw", 5, "--pure"), "both choose formats"),
        (("--bpw", 5, "--set", "q2-q8"), "both choose formats"),
        (("--bpw", 0), "expected bits per weight"),
        (("--bpw", "nan"), "expected bits per weight"),
        (("--bpw", 33), "expected bits per weight"),
        (("--max-size", "small"), "expected an amount"),
        (("--max-size", "3MB", "--among", ","), "expected formats with commas"),
        (
            ("--max-size", "3MB", "--among", "q4_k,nf4"),
            "no one file has them all: a gguf file holds q4_k; a safetensors file holds nf4",
        ),
        (
            ("--max-size", "3MB", "--among", "q4_k,nvfp4", "-o", "x.gguf"),
            "no reader of it has nvfp4 in a gguf file",
        ),
        (
            ("--bpw", 5, "--among", "nf4,int8_rowwise"),
            "no one reader has them all in a safetensors file",
        ),
        (
            ("--bpw", 5, "--among", "iq4_nl,int8_rowwise", "--target", "sdcpp"),
            "for sdcpp: a gguf file holds iq4_nl; a safetensors file holds int8_rowwise",
        ),
        (("--bpw", 5, "--among", "tq2_0,int8_rowwise"), "tq2_0 is a format of no type"),
        (("--max-size", "1MB"), "cannot be met"),
        (("--max-size", "3MB", "-o", "x"), "single files"),
        (("--max-size", "3MB", "-o", "x/"), "writes one file"),
        (("-t", "q4_k_s", "--among", "q4_k"), "--among is for a budget"),
        (("-t", "q4_k_s", "--explain"), "--explain is for a budget"),
        (("-t", "q4_k_s", "--sensitivity", "f"), "--sensitivity is for a budget"),
        (("-t", "q4_k_s", "--free-kept"), "--free-kept is for a budget"),
        (("--max-size", "5MB", "--free-kept", "-o", "x.safetensors"), "--free-kept is for .gguf"),
        (("--max-size", "3MB", "--part", "vae", "-o", "x.safetensors"), "quantize it by type"),
    ],
)
def test_wrong_requests_are_usage_errors(command, flux, here, words, message):
    ran = command("quantize", flux, *words)
    assert ran.code == 2
    assert message in ran.err
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [("{", 1, "not valid JSON"), (None, 1, "No such file"), ("{}", 1, "no sensitivity file")],
)
def test_a_sensitivity_that_is_none_stops_the_run(command, flux, here, text, code, message):
    if text is not None:
        Path("s.json").write_text(text)
    ran = command("quantize", flux, "-o", "a.gguf", "--bpw", 6, "--sensitivity", "s.json")
    assert ran.code == code
    assert message in ran.err
    assert not Path("a.gguf").exists()


def test_the_folder_one_stands_in_is_a_source(command, flux, monkeypatch):
    monkeypatch.chdir(flux)
    ran = command("quantize", ".", "--bpw", 6, "--dry-run", "--json")
    assert ran.code == 0, ran.err


def test_an_output_that_is_there_is_left_before_anything_is_measured(command, flux, here):
    Path("a.gguf").write_bytes(b"mine")
    ran = command("quantize", flux, "-o", "a.gguf", "--bpw", 6)
    assert ran.code == 2
    assert "use --force" in ran.err
    assert Path("a.gguf").read_bytes() == b"mine"
    assert os.listdir() == ["a.gguf"]  # noqa: PTH208 - names alone


def test_a_found_file_that_prices_other_formats_is_passed_over_and_said(command, flux, here):
    assert command("quantize", flux, "--max-size", "2.9MB", "--json", "--dry-run").code == 0
    with opened(flux) as (found, _, _match):
        source = fingerprint(found)
    errors = {"double_blocks.0.img_mlp.0.weight": {"q4_k": 1.0}}
    keep_sensitivity(Sensitivity("flux1", "outputs", "", source, errors, {}))
    words = ("--max-size", "6.5MB", "--target", "comfyui", "-o", "x.safetensors", "--dry-run")
    ran = command("quantize", flux, *words)
    assert ran.code == 0, ran.err
    assert "is not used: it knows no error of" in " ".join((ran.out + ran.err).split())


def test_a_recipe_is_not_written_over_what_is_read(command, flux, here):
    for option, name in (("--sensitivity", "s.json"), ("--imatrix", "m.gguf")):
        Path(name).write_text("kept")
        words = ("--max-size", "3MB", option, name, "--emit-recipe", name, "--force", "--dry-run")
        ran = command("quantize", flux, *words, "-o", "x.gguf")
        assert ran.code == 2
        assert "is read or written already" in ran.err
        assert Path(name).read_text() == "kept"


@pytest.mark.parametrize("bits", ["1e-7", "0.00001"])
def test_the_range_of_bits_is_told_however_few_were_asked_for(command, flux, here, bits):
    ran = command("quantize", flux, "--dry-run", "--bpw", bits)
    assert ran.code == 2
    assert "takes 4.728 to 16.056 bits per weight" in " ".join(ran.err.split())


def test_freed_layers_are_told_and_the_recipe_frees_them_again(command, flux, here, digest_tensors):
    words = ("quantize", flux, "-o", "a.gguf", "--max-size", "2.5MB", "--free-kept")
    ran = command(*words, "--dry-run")
    assert ran.code == 0, ran.err
    told = " ".join(ran.out.split())
    assert "allocated, freed: 6" in told
    assert re.search(
        r"freed, q\d_\w for bf16, [\d.]+ KiB less: time_in.in_layer.weight \(types keep it: "
        r"timestep embedding\)",
        told,
    )
    made = command(*words, "--emit-recipe", "r.txt", "--json")
    assert made.code == 0, made.err
    freed = made.result["allocation"]["freed"]
    assert {one["kept_as"] for one in freed} == {"bf16"}
    assert len(freed) == 6
    again = command("quantize", flux, "-o", "b.gguf", "--recipe-from", "r.txt", "--json")
    assert again.code == 0, again.err
    assert digest_tensors("a.gguf") == digest_tensors("b.gguf")
    assert not any("recipe" in text for text in again.json["warnings"])


def test_a_text_encoder_is_named_by_its_bits_and_its_recipe_is_read_again(
    command, flux, here, digest_tensors
):
    source = flux / "text_encoder_2" / "model.safetensors"
    made = command("quantize", source, "--max-size", "250kB", "--emit-recipe", "r.txt", "--json")
    assert made.code == 0, made.err
    file = next(here.glob("*.gguf"))
    found = made.result["allocation"]
    assert file.stat().st_size == found["nbytes"] <= 250_000
    assert file.name.startswith(f"model-{found['bits_per_weight']:.2f}bpw-")
    again = command("quantize", source, "-o", "b.gguf", "--recipe-from", "r.txt", "--json")
    assert again.code == 0, again.err
    assert digest_tensors(file) == digest_tensors("b.gguf")
    shown = command("quantize", source, "--bpw", 5, "--dry-run")
    assert "text_encoder_3 takes" in shown.out
