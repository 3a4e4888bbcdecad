"""`quantize` with several types: names, sets, what is refused, what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffquant.cli.outputs import named_outputs, types_from
from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.quant.type_sets import TYPE_SETS
from diffquant.quant.types import TYPES, type_named

THREE = ("-t", "q8_0", "-t", "Q4_K_S", "-t", "fp8_scaled")
NAMES = {"flux1-shapes-Q8_0.gguf", "flux1-shapes-Q4_K_S.gguf"}
NAMES |= {"flux1-shapes_fp8_scaled.safetensors"}


@pytest.fixture
def flux(examples):
    return examples / "flux1-shapes"


def kinds(*names):
    return tuple(map(type_named, names))


def test_a_folder_gets_a_published_name_per_type(command, flux, tmp_path):
    ran = command("quantize", flux, "-o", f"{tmp_path}/new/", *THREE)
    assert (ran.code, ran.err) == (0, "")
    assert {one.name for one in (tmp_path / "new").iterdir()} == NAMES
    assert f"wrote 3 outputs to {tmp_path / 'new'}" in ran.out
    rows = [line.split() for line in ran.out.splitlines() if line.endswith((".gguf", "tensors"))]
    assert [row[0] for row in rows] == ["q8_0", "q4_k_s", "fp8_scaled"]
    assert all("pass" in row for row in rows)
    assert "read 9.29 MiB of weights; one by one it would be 30.72 MiB" in ran.out


def test_without_an_output_they_go_to_the_current_folder(command, flux, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("quantize", flux, *THREE, "-q").code == 0
    assert {one.name for one in tmp_path.glob("flux*")} == NAMES


def test_json_has_a_report_per_output(command, flux, tmp_path):
    one = command("quantize", flux, "-o", tmp_path / "a.gguf", "-t", "q8_0", "--json").result
    assert "outputs" not in one
    ran = command("quantize", flux, "-o", f"{tmp_path}/{{type}}.gguf", *THREE[:4], "--json")
    result = ran.result
    assert [Path(job["output"]).name for job in result["outputs"]] == ["Q8_0.gguf", "Q4_K_S.gguf"]
    assert result["outputs"][0].keys() == one.keys()
    assert result["outputs"][0]["tensors"] == one["tensors"]
    assert result["read_nbytes"] < sum(job["read_nbytes"] for job in result["outputs"])
    assert (tmp_path / "Q8_0.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_a_set_is_every_type_that_is_published_together(command, flux, tmp_path):
    ran = command("quantize", flux, "-o", f"{tmp_path}/x/", "--set", "Q2-Q8", "--dry-run")
    assert ran.code == 0
    for name in TYPE_SETS["q2-q8"]:
        assert f"flux1-shapes-{name.upper()}.gguf" in ran.out
    assert not (tmp_path / "x").exists()
    told = command("quantize", "--help").out
    assert "q2-q8 = q8_0, q6_k" in " ".join(told.split())


def test_sets_hold_types_of_the_table_from_large_to_small():
    for names in TYPE_SETS.values():
        assert set(names) <= TYPES.keys()
        assert names == tuple(sorted(names, key=lambda name: -int(name[1])))


def test_a_failed_type_makes_the_run_fail_and_names_its_weights(command, flux, tmp_path):
    ran = command("quantize", flux, "-o", tmp_path, "-t", "q8_0", "-t", "int8_tensor")
    assert ran.code == 3
    assert "int8_tensor: fail: " in ran.out
    assert "int8_tensor.safetensors was written, but verification failed" in ran.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("-t", "q8_0", "-t", "Q8_0"), "q8_0 is asked for twice (-t q8_0 and -t Q8_0)"),
        (("-t", "q4_k", "-t", "q4_k_m"), "q4_k_m is asked for twice"),
        (("-t", "q8_0", "--set", "q2-q8"), "(-t q8_0 and --set q2-q8)"),
        (("--set", "q2-q8", "--set", "q2-q8"), "asked for twice (--set q2-q8)"),
        ((*THREE, "--resume"), "--resume is for one output"),
        ((*THREE, "--error-lora", "e.safetensors"), "--error-lora is for one output"),
        ((*THREE, "--emit-recipe", "r.txt"), "--emit-recipe is for one output"),
        ((*THREE, "--recipe-from", "r.txt"), "--recipe-from is for one output"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(command, flux, tmp_path, options, told):
    ran = command("quantize", flux, "-o", tmp_path, *options)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err
    assert not list(tmp_path.glob("flux*"))


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("x.gguf", "3 types make 3 files; give -o a folder"),
        ("x", "or a name with {type} in it"),
        ("x-{type}.gguf", "type fp8_scaled cannot go into a .gguf file"),
        ("x-{type}.zip", "cannot write .zip files"),
        ("no/where/", "does not exist, create it first"),
    ],
)
def test_an_output_that_cannot_hold_them_is_a_usage_error(command, flux, tmp_path, output, told):
    ran = command("quantize", flux, "-o", f"{tmp_path}/{output}", *THREE)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err
    assert not list(tmp_path.glob("x*"))


def test_a_run_that_fails_removes_the_folder_it_made(command, flux, tmp_path):
    ran = command("quantize", flux, "-o", f"{tmp_path}/x/", "-t", "q8_0", "-t", "iq2_xs")
    assert ran.code == 1
    assert "importance matrix" in ran.err
    assert not (tmp_path / "x").exists()


def test_one_type_may_use_a_template_too(command, flux, tmp_path):
    assert command("quantize", flux, "-o", f"{tmp_path}/m-{{type}}.gguf", "-t", "q8_0").code == 0
    assert (tmp_path / "m-Q8_0.gguf").exists()


def test_templates_spell_types_as_their_container_does():
    assert named_outputs("m-{type}.gguf", "", kinds("q8_0")) == (Path("m-Q8_0.gguf"),)
    found = named_outputs("m_{type}.safetensors", "", kinds("fp8_scaled", "nf4"))
    assert found == (Path("m_fp8_scaled.safetensors"), Path("m_nf4.safetensors"))
    assert named_outputs(None, "m", kinds("int8_bnb")) == (Path("m-int8_bnb"),)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownFormat, match="q2-q8"):
        types_from((), ("q2_q8",))
    with pytest.raises(UsageError, match="twice"):
        types_from(("q8_0",), ("q2-q8",))
