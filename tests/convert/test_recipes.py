"""Recipes: text both ways, taken from files, followed to the byte, and never ignored in silence."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from diffquant.convert.jobs import run_job
from diffquant.convert.plan import Request
from diffquant.convert.recipe_source import load_recipe
from diffquant.convert.recipes import (
    Recipe,
    parse_recipe,
    recipe_of,
    render_recipe,
)
from diffquant.core.errors import (
    CheckpointError,
    MalformedFile,
    UnknownArchitecture,
    UnknownFormat,
    UsageError,
)
from diffquant.quant.formats import FORMATS
from diffquant.quant.policy import Rule
from diffquant.quant.types import type_named

KEY = "double_blocks.0.img_attn.proj.weight"
WRITTEN = (  # every dialect, and the formats of each part that a header can name
    ("q4_k_s", ".gguf", "denoiser"),
    ("bf16", ".gguf", "denoiser"),
    ("fp8_scaled", ".safetensors", "vae"),
    ("int8_rowwise", ".safetensors", "vae"),
    ("nf4", ".safetensors", "vae"),
    ("fp8_e4m3", ".safetensors", "vae"),
    ("nf4", "", "vae"),
)


def request(kind: str, suffix: str, **options) -> Request:
    container = {".gguf": "gguf", "": "folder"}.get(suffix, "safetensors")
    return Request(container, type=type_named(kind), **options)


def same(left, right):
    return left[:2] == right[:2] and bytes(left[2]) == bytes(right[2])


def rows(report):
    return [(row.part, row.key, row.stored) for row in report.tensors]


@pytest.mark.parametrize("model", ["flux1-shapes", "sd15-shapes"])
@pytest.mark.parametrize(("kind", "suffix", "part"), WRITTEN)
def test_a_file_is_its_own_recipe(examples, tmp_path, load, model, kind, suffix, part):
    """The plan's recipe, the text of it and the file all give the file's tensors again."""
    source = examples / model
    odd = Rule("mlp|ff", "q8_0" if suffix == ".gguf" else "f16", "odd")
    first = run_job(source, tmp_path / f"a{suffix}", request(kind, suffix, rules=(odd,)))
    text = tmp_path / "text"
    text.write_text(render_recipe(recipe_of(first.architecture, kind, rows(first))))
    for name, origin in (("b", tmp_path / f"a{suffix}"), ("c", text)):
        recipe = load_recipe(origin)
        assert recipe.type == kind
        assert recipe.part(part)
        out = tmp_path / f"{name}{suffix}"
        report = run_job(source, out, request(kind, suffix, recipe=recipe))
        again, before = load(out)[0], load(tmp_path / f"a{suffix}")[0]
        assert list(again) == list(before)
        assert all(same(again[key], before[key]) for key in before)
        assert report.policy == ("" if FORMATS[type_named(kind).base].is_cast else "recipe")
        assert not [text for text in report.warnings if "recipe" in text]
        assert all("recipe" in row.reason for row in report.tensors if row.stored != "i64")
    other = run_job(source, tmp_path / "other", request(kind, suffix), dry_run=True)
    assert rows(other) != rows(first)  # the rule matters, so following it was no accident


def test_text_is_read_as_it_was_written():
    odd = ("a key", "größe", ' "quoted', "line\nbreak", "[x]", "#")
    recipe = Recipe("flux1", "q4_0", {"denoiser": dict.fromkeys(odd, "q8_0"), "vae": {"a": "i64"}})
    text = render_recipe(recipe)
    again = parse_recipe(text.encode(), Path("x"))
    assert (again.architecture, again.type) == ("flux1", "q4_0")
    assert again.formats == recipe.formats
    assert len(text.splitlines()) == 4 + 2 * 2 + 7  # a line per tensor


HEAD = "# diffquant recipe 1\narchitecture = flux1\ntype = q8_0\n"
BROKEN = {
    "future version": ("# diffquant recipe 2\n", MalformedFile, "recipe version '2'"),
    "no version": ("# diffquant recipe \n", MalformedFile, "recipe version ''"),
    "not text": (HEAD.encode() + b"[denoiser]\nq8_0 \xff\n", MalformedFile, "not UTF-8"),
    "unknown field": (HEAD + "color = red\n", MalformedFile, "line 4: expected one of tool"),
    "field twice": (HEAD + "type = q8_0\n", MalformedFile, "line 4"),
    "no part": (HEAD + "q8_0 a.weight\n", MalformedFile, "line 4"),
    "part twice": (HEAD + "[vae]\n[vae]\n", MalformedFile, "line 5: [vae] appears twice"),
    "key twice": (HEAD + "[vae]\nf32 a\n f16  a\n", MalformedFile, "line 6: 'a' appears twice"),
    "no key": (HEAD + "[vae]\nf32\n", MalformedFile, "line 5: expected FORMAT KEY"),
    "half a string": (HEAD + '[vae]\nf32 "a\n', MalformedFile, "line 5: expected FORMAT KEY"),
    "a number": (HEAD + '[vae]\nf32 "a" 3\n', MalformedFile, "line 5"),
    "unknown format": (HEAD + "[vae]\nq9 a\n", UnknownFormat, "line 5: 'q9'"),
    "unknown type": (HEAD.replace("q8_0", "q9") + "[vae]\nf32 a", UnknownFormat, "'q9'"),
    "unknown architecture": (HEAD.replace("flux1", "x"), MalformedFile, "architecture 'x'"),
    "no architecture": ("# diffquant recipe 1\n[vae]\nf32 a", MalformedFile, "architecture ''"),
    "no tensor": (HEAD + "[denoiser]\n", MalformedFile, "without a tensor"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_says_where(tmp_path, name):
    text, error, message = BROKEN[name]
    path = tmp_path / "a.recipe"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=re.escape(message)):
        load_recipe(path)


def test_a_huge_recipe_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "a.recipe"
    path.write_bytes(HEAD.encode() + b"#" * (16 << 20))
    with pytest.raises(MalformedFile, match="more than 16777216 bytes"):
        load_recipe(path)


def test_what_is_no_recipe_is_an_error(tmp_path, write):
    with pytest.raises(CheckpointError, match="no such file"):
        load_recipe(tmp_path / "absent")
    write(tmp_path / "a.safetensors", {"a": ("F32", np.zeros(4, "f4"))})
    with pytest.raises(UnknownArchitecture, match=r"no recipe from .*a\.safetensors"):
        load_recipe(tmp_path / "a.safetensors")


def plan(examples, tmp_path, recipe, kind="q4_k_s", suffix=".gguf", model="flux1-shapes", **more):
    made = request(kind, suffix, recipe=recipe, **more)
    return run_job(examples / model, tmp_path / f"a{suffix}", made, dry_run=True)


def test_what_the_recipe_leaves_open_or_names_in_vain_is_said(examples, tmp_path):
    recipe = Recipe("flux1", "q4_k_s", {"denoiser": {KEY: "q8_0", "absent": "q8_0"}, "vae": {}})
    report = plan(examples, tmp_path, recipe)
    text = " ".join(report.warnings)
    assert "1 keys of the recipe are not in the source: absent" in text
    assert f"the recipe does not name {len(report.tensors) - 1} tensors" in text
    assert "the recipe's part vae is not written" in text
    assert {row.stored for row in report.tensors if row.key == KEY} == {"q8_0"}


REFUSED = {
    "a vector": ("double_blocks.0.img_attn.proj.bias", "q4_k", "f32", "a vector is not packed"),
    "no such container": (KEY, "nf4", "q4_k", "a gguf output cannot hold it"),
    "scaled": (KEY, "fp8_e4m3_scaled", "q4_k", "a gguf output cannot hold it"),
    "no encoder": (KEY, "q8_k", "q4_k", "it is read, not written"),
    "bf16 vector": ("double_blocks.0.img_attn.proj.bias", "bf16", "f32", "in linear layers only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_format_that_cannot_be_had_is_said_twice(examples, tmp_path, name):
    key, wanted, stored, why = REFUSED[name]
    report = plan(examples, tmp_path, Recipe("flux1", "q4_k_s", {"denoiser": {key: wanted}}))
    row = next(row for row in report.tensors if row.key == key)
    assert row.stored == stored
    assert why in row.reason
    told = [text for text in report.warnings if "the recipe is not followed for 1 tensors" in text]
    assert f"{wanted} -> {stored}: {key}" in told[0]


def test_a_shape_that_the_format_cannot_hold_falls_back_with_its_reason(examples, tmp_path):
    key = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    recipe = Recipe("sd15", "q4_k_s", {"denoiser": {key: "q6_k"}})
    report = plan(examples, tmp_path, recipe, model="sd15-shapes")
    row = next(row for row in report.tensors if row.key == key)
    assert row.stored != "q6_k"
    assert "q6_k needs last dimension divisible by 256" in row.reason
    assert any(f"q6_k -> {row.stored}: {key}" in text for text in report.warnings)


def test_rules_of_the_command_line_win_over_the_recipe(examples, tmp_path):
    recipe = Recipe("flux1", "q4_k_s", {"denoiser": {KEY: "q8_0"}})
    rule = Rule(re.escape(KEY), "q4_0", "mine")
    report = plan(examples, tmp_path, recipe, rules=(rule,))
    assert {row.stored for row in report.tensors if row.key == KEY} == {"q4_0"}
    assert any("q8_0 -> q4_0" in text for text in report.warnings)


def test_another_architectures_recipe_is_refused(examples, tmp_path):
    recipe = Recipe("sd15", "q8_0", {"denoiser": {KEY: "q8_0"}}, name="sd.gguf")
    with pytest.raises(UsageError, match=r"sd\.gguf is a recipe of sd15, the source is flux1"):
        plan(examples, tmp_path, recipe)


def test_a_recipe_reaches_parts_that_the_type_alone_would_keep(examples, tmp_path):
    whole = request("fp8_scaled", ".safetensors", all_parts=True)
    first = run_job(examples / "flux1-shapes", tmp_path / "a.safetensors", whole, dry_run=True)
    recipe = recipe_of(first.architecture, "fp8_scaled", rows(first))
    again = plan(examples, tmp_path, recipe, "fp8_scaled", ".safetensors")
    assert rows(again) == rows(first)
    stored = {row.stored for row in again.tensors if row.part == "text_encoder_2"}
    assert "fp8_e4m3_scaled" in stored


def test_diffusers_names_give_a_canonical_recipe(examples, tmp_path):
    """q, k and v apart in the folder, fused in the single file: the finest of them counts."""
    rule = Rule(r"double_blocks\.0\.img_attn\.qkv\.weight", "f32", "odd")
    first = run_job(examples / "flux1-shapes", tmp_path / "a", request("nf4", "", rules=(rule,)))
    recipe = load_recipe(tmp_path / "a")
    assert recipe.part("denoiser")["double_blocks.0.img_attn.qkv.weight"] == "f32"
    assert set(recipe.part("denoiser")) == {r.key for r in first.tensors if r.part == "denoiser"}


def test_a_gguf_of_another_writer_is_labelled_by_its_file_type(examples, tmp_path):
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "ours.gguf"
    run_job(examples / "flux1-shapes", out, request("q8_0", ".gguf"))
    reader = gguf.GGUFReader(out)
    for number, expected in ((7, "q8_0"), (9999, "q8_0"), (14, "q4_k_s")):
        theirs = tmp_path / f"{number}.gguf"
        writer = gguf.GGUFWriter(theirs, "flux")
        writer.add_file_type(number)
        for one in reader.tensors:
            writer.add_tensor(one.name, one.data, raw_dtype=one.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        recipe = load_recipe(theirs)
        assert recipe.type == expected
        assert recipe.formats == load_recipe(out).formats
