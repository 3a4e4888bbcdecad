"""`calibrate`, `imatrix`, `quantize --imatrix` and `inspect` on one matrix."""

from dataclasses import replace

import numpy as np
import pytest

from diffquant.convert.sensitivity import read_sensitivity
from diffquant.io import open_source
from diffquant.io.imatrix import read_imatrix
from diffquant.quant.formats import FORMATS


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle on a blue background\n# not a prompt\na green square\n")
    return path


@pytest.fixture
def flux(examples):
    return examples / "flux1-shapes"


@pytest.fixture
def measured(command, flux, prompts, tmp_path):
    """imatrix.gguf of flux1-shapes, made by the command."""
    out = tmp_path / "imatrix.gguf"
    ran = command(
        "calibrate", flux, "--prompts", prompts, "-o", out, "--steps", 1, "--size", 64, "--json"
    )
    assert ran.code == 0, ran.err
    assert ran.result["pictures"] == ran.result["calls"] == 2
    assert ran.result["entries"] == ran.result["layers"]
    return out


def test_a_sensitivity_is_written_beside_the_matrix(command, examples, prompts, tmp_path):
    model, out = examples / "qwen-image-shapes", tmp_path / "model.sensitivity.json"
    args = ("calibrate", model, "--prompts", prompts, "-o", tmp_path / "m.gguf", "--steps", 1)
    args += ("--size", 64, "--sensitivity", out)
    ran = command(*args, "--among", "iq2_xxs,q8_0", "--level", "latents", "--json")
    assert ran.code == 0, ran.err
    assert (ran.result["sensitivity"], ran.result["unused"]) == (str(out), 4)
    found = read_sensitivity(out)
    assert found.errors["proj_out.weight"].keys() == {"iq2_xxs", "q8_0"}
    assert len(found.errors) == ran.result["layers"]
    assert found.context["level"] == "latents"
    again = command(*args)
    assert again.code == 2
    assert "use --force" in again.err


def test_importance_of_gradients_is_written_and_priced_with(command, examples, prompts, tmp_path):
    model, out = examples / "qwen-image-shapes", tmp_path / "model.sensitivity.json"
    made = {}
    for kind in ("inputs", "gradients"):
        matrix = tmp_path / f"{kind}.gguf"
        args = ("calibrate", model, "--prompts", prompts, "-o", matrix, "--steps", 1, "--size", 64)
        extra = ("--sensitivity", out, "--among", "q4_k,iq2_xxs") if kind == "gradients" else ()
        ran = command(*args, "--importance", kind, *extra, "--json")
        assert ran.code == 0, ran.err
        assert ran.result["importance"] == kind
        made[kind] = read_imatrix(matrix)
    key = "transformer_blocks.0.attn.to_out.0.weight"
    plain, weighed = (made[kind].entries[key].values() for kind in ("inputs", "gradients"))
    assert made["inputs"].entries.keys() == made["gradients"].entries.keys()
    assert weighed.mean() == pytest.approx(1)
    assert np.corrcoef(plain, weighed)[0, 1] < 0.99
    assert read_sensitivity(out).context["weighed_by"] == "gradients"


def test_gradients_alone_can_be_those_of_latents(command, examples, prompts, tmp_path):
    matrix = tmp_path / "imatrix.gguf"
    args = ("calibrate", examples / "qwen-image-shapes", "--prompts", prompts, "-o", matrix)
    args += ("--steps", 1, "--size", 64, "--importance", "gradients", "--level", "latents")
    ran = command(*args, "--json")
    assert ran.code == 0, ran.err
    assert (ran.result["sensitivity"], ran.result["unused"]) == (None, 4)
    assert any("weigh by inputs" in text for text in ran.json["warnings"])


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--among", "q4_k"), "--among: only with --sensitivity"),
        (("--level", "latents"), "--level: only with --sensitivity"),
        (("--weighed",), "--weighed: only with --sensitivity"),
        (("--sensitivity", "a.txt"), "written as .json"),
        (("--sensitivity", "nowhere/a.json"), "nowhere"),
        (("--sensitivity", "a.json", "--among", ","), "expected formats with commas"),
        (("--sensitivity", "a.json", "--among", "q4_9"), "did you mean"),
    ],
)
def test_a_sensitivity_that_cannot_be_made_is_refused_first(command, flux, prompts, args, told):
    ran = command("calibrate", flux, "--prompts", prompts, "-o", "m.gguf", *args)
    assert ran.code in (2, 4)
    assert told in ran.err


def test_from_prompts_to_a_packed_file(command, flux, measured, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "q8_0", replace(FORMATS["q8_0"], importance="optional"))
    out = tmp_path / "out.gguf"
    args = ("quantize", flux, "-o", out, "-t", "q8_0", "--imatrix", measured)
    planned = command(*args, "--dry-run")
    assert planned.code == 0, planned.err
    assert "type's base; with importance" in planned.out
    assert planned.err == ""
    done = command(*args, "--imatrix", measured, "--json")
    assert done.code == 0, done.err
    with open_source(out) as source:
        assert source.metadata["quantize.imatrix.file"] == "imatrix.gguf, imatrix.gguf"
        assert source.metadata["quantize.imatrix.dataset"] == "prompts.txt"
        assert source.metadata["quantize.imatrix.chunks_count"] == 4
    monkeypatch.setitem(FORMATS, "q8_0", replace(FORMATS["q8_0"], importance="required"))
    refused = command("quantize", flux, "-o", tmp_path / "b.gguf", "-t", "q8_0")
    assert refused.code == 1
    assert "--imatrix FILE" in refused.err
    assert not (tmp_path / "b.gguf").exists()


def test_matrices_merge_and_change_their_kind(command, measured, tmp_path):
    out = tmp_path / "both.dat"
    ran = command("imatrix", measured, measured, "-o", out, "--prefix", "model.", "--json")
    assert ran.code == 0, ran.err
    assert ran.result["chunks"] == 4
    before, after = read_imatrix(measured), read_imatrix(out)
    assert after.legacy
    assert set(after.entries) == {f"model.{name}" for name in before.entries}
    shown = command("imatrix", out, "-v")
    assert "4 chunks" in shown.out
    assert "model.single_blocks.0.linear1.weight" in shown.out
    assert command("imatrix", measured, "-o", out).code == 2
    assert command("imatrix", measured, "-o", out, "--force").code == 0
    assert command("imatrix", measured, "-o", tmp_path / "a.txt").code == 2


def test_inspect_knows_both_kinds(command, measured, tmp_path):
    legacy = tmp_path / "imatrix.dat"
    assert command("imatrix", measured, "-o", legacy).code == 0
    ran = command("inspect", measured, legacy, "--json")
    assert [one["kind"] for one in ran.result["files"]] == ["imatrix", "imatrix"]
    assert [one["container"] for one in ran.result["files"]] == ["gguf", "dat"]
    assert {one["metadata"]["chunks"] for one in ran.result["files"]} == {"2"}
    assert "importance matrix · dat" in command("inspect", legacy).out


def test_an_existing_file_stops_the_run_before_it_starts(command, flux, prompts, tmp_path):
    out = tmp_path / "imatrix.gguf"
    out.write_bytes(b"mine")
    ran = command("calibrate", flux, "--prompts", prompts, "-o", out)
    assert (ran.code, out.read_bytes()) == (2, b"mine")
    assert "--force" in ran.err
    assert command("calibrate", flux, "--prompts", prompts, "-o", tmp_path / "a.bin").code == 2


def test_an_interrupted_run_leaves_nothing(command, flux, prompts, tmp_path, monkeypatch):
    from diffquant.runtime.pipeline import Pipeline

    def stop(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "decode", stop)
    out = tmp_path / "imatrix.gguf"
    ran = command("calibrate", flux, "--prompts", prompts, "-o", out, "--steps", 1, "--size", 64)
    assert ran.code == 130
    assert not [one for one in tmp_path.iterdir() if "imatrix" in one.name]


def test_a_card_that_is_too_small_ends_in_6(command, flux, prompts, tmp_path, monkeypatch):
    """Its weights are all on the device: nothing is planned here."""
    import torch

    from diffquant.runtime.calibration_run import CalibrationRun

    def full(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(CalibrationRun, "open", full)
    ran = command("calibrate", flux, "--prompts", prompts, "-o", tmp_path / "i.gguf")
    assert ran.code == 6
    assert "out of memory on the GPU" in ran.err
    assert "--device cpu" in ran.err


def test_a_quantized_source_is_named_as_one(command, gguf_file, flux, prompts, tmp_path):
    args = ("--prompts", prompts, "-o", tmp_path / "i.gguf", "--base", flux, "--steps", 1)
    ran = command("calibrate", gguf_file, *args, "--size", 64)
    assert ran.code == 0
    assert "already quantized (q4_k" in ran.err


def test_a_damaged_matrix_is_one_line(command, flux, tmp_path):
    path = tmp_path / "m.dat"
    path.write_bytes(b"\x05\x00\x00\x00oops")
    ran = command("quantize", flux, "-o", tmp_path / "a.gguf", "-t", "q8_0", "--imatrix", path)
    assert ran.code == 1
    assert "not an importance matrix" in ran.err
