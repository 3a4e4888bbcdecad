"""`diffquant recommend`: a ranked table, reasons below, one JSON object."""

from __future__ import annotations

import shlex

import pytest

from diffquant.convert.jobs import run_job
from diffquant.convert.match import to_canonical
from diffquant.convert.request import Request
from diffquant.convert.sensitivity import Sensitivity, write_sensitivity
from diffquant.inspect.subject import open_subject
from diffquant.quant.formats import FORMATS
from diffquant.quant.types import type_named


def test_a_table_and_reasons(command, examples):
    words = ("--vram", "1GiB", "--for", "comfyui-gguf")
    short = command("recommend", examples / "flux1-shapes", *words)
    assert "more; -v lists all" in short.out
    ran = command("recommend", examples / "flux1-shapes", *words, "-v")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    first = next(i for i, line in enumerate(lines) if "q8_0" in line)
    last = next(i for i, line in enumerate(lines) if "q2_k" in line)
    assert first < last < next(i for i, line in enumerate(lines) if "not recommended" in line)
    assert "-t bf16 --target comfyui-gguf" in ran.out
    assert "--vram 1GiB" in ran.out
    assert "iq3_s (gguf): comfyui-gguf cannot read" in ran.out


def mix_line(ran):
    (line,) = (one for one in ran.out.splitlines() if " mix " in one)
    return line.strip()


def test_the_mix_that_is_offered_is_ranked_by_the_same_errors_and_works(
    command, examples, tmp_path
):
    known = tmp_path / "own errors.json"
    flux = examples / "flux1-shapes"
    prices = {one.name: one.gaussian_error**2 for one in FORMATS.values() if one.encodes}
    with open_subject(flux) as subject:
        keys = [one.target for one in to_canonical(subject.match.part("denoiser"))]
    found = Sensitivity("flux1", "outputs", "made up", "", dict.fromkeys(keys, prices), {})
    write_sensitivity(known, found)
    ran = command("recommend", flux, "--vram", " 410MiB", "--sensitivity", known)
    words = shlex.split(mix_line(ran).partition(": diffquant ")[2])
    assert words == ["quantize", str(flux), "--vram", "410MiB", "--sensitivity", str(known)]
    assert command(*words, "--dry-run").code == 0


def test_no_mix_is_offered_where_none_can_be_made(command, examples, tmp_path):
    flux, packed = examples / "flux1-shapes", tmp_path / "flux-Q8_0.gguf"
    run_job(flux, packed, Request("gguf", type=type_named("q8_0")))
    ran = command("recommend", packed, "--vram", "1GiB")
    assert "no mix is made for this device: the denoiser is already quantized (q8_0)" in ran.out
    assert command("quantize", packed, "--vram", "1GiB", "--dry-run").code == 1
    ran = command("recommend", flux, "--vram", "409MiB", "--json")
    assert ran.result["rows"]
    assert ran.result["no_mix"] == "no type leaves the whole denoiser on the device"
    ran = command("recommend", flux, "--vram", "418880KiB")
    assert "no mix is made for this device: mixes are of larger types than iq2_s (`" in ran.out
    assert command("quantize", flux, "--vram", "418880KiB", "--dry-run").code != 0
    some = command("quantize", flux, "--vram", "418880KiB", "--among", "iq2_s", "--dry-run")
    assert some.code == 0


def test_json_has_every_row(command, examples):
    ran = command("recommend", examples / "flux1-shapes", "--vram", "1GiB", "--json")
    found = ran.result
    assert found["vram_nbytes"] == 1 << 30
    assert {"type", "container", "nbytes", "error", "peak_nbytes", "speed", "loaders"} <= set(
        found["rows"][0]
    )
    assert found["others"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "Missing option '--vram'"),
        (("--vram", "much"), 2, "expected an amount"),
        (("--vram", "1GiB", "--for", "nobody"), 4, "unknown loader 'nobody'"),
        (("--vram", "1GiB", "--card", "voodoo"), 2, "voodoo"),
        (("--vram", "1GiB", "--sensitivity", "none.json"), 1, "No such file"),
    ],
)
def test_wrong_requests(command, examples, words, code, message):
    ran = command("recommend", examples / "flux1-shapes", *words)
    assert ran.code == code
    assert message in ran.err


def test_a_file_that_is_not_there(command, tmp_path):
    ran = command("recommend", tmp_path / "none.safetensors", "--vram", "1GiB")
    assert ran.code == 1
    assert "no such file" in ran.err
