"""`diffquant recommend`: a ranked table, reasons below, one JSON object."""

from __future__ import annotations

import pytest


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
