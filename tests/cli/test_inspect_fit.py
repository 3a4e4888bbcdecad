"""`inspect --vram`, `--size` and `--with`: verdicts on a screen and as JSON, and bad values."""

import pytest

from diffquant.cli.values import bytes_from
from diffquant.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("8gib", 8 << 30),
        ("8GB", 8_000_000_000),
        ("8g", 8 << 30),
        ("1.5 GiB", 3 << 29),
        ("512MiB", 512 << 20),
        ("4096", 4096),
        ("2t", 2 << 40),
    ],
)
def test_amounts_of_memory_are_read(text, nbytes):
    assert bytes_from(text, "--vram") == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "8 apples", "0", "0GiB", "nan", "1e9", "8GiBs", "٣GiB", "9" * 40]
)
def test_other_amounts_are_refused_with_an_example(text):
    with pytest.raises(UsageError, match="such as 8GiB"):
        bytes_from(text, "--vram")


def test_a_budget_gives_a_verdict_line_and_bars(command, examples, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ran = command("inspect", examples / "sd15-shapes", "--vram", "8GiB", "--size", "256x256")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[1].startswith("  fits in 8.00 GiB: every part stays on the device")
    assert "256x256" in lines[2]
    assert sum(line.startswith(("  encode", "  denoise", "  decode")) for line in lines) == 3
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("columns", ["40", "80", "140"])
def test_screens_keep_to_their_width(command, examples, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    ran = command("inspect", examples / "flux1-shapes", "--vram", "1GiB", "--explain")
    bars = [line for line in ran.out.splitlines() if line.startswith("  denoise ")]
    assert len(bars[0]) <= max(int(columns), 60)


def test_a_file_that_does_not_fit_is_no_error(command, examples):
    ran = command("inspect", examples / "sd15-shapes", "--vram", "1MiB")
    assert ran.code == 0
    assert "does not fit" in ran.out


def test_a_size_alone_gives_an_estimate(command, examples):
    ran = command("inspect", examples / "sd15-shapes", "--size", "512x512")
    assert ran.code == 0
    assert "needs" in ran.out.splitlines()[1]


def test_fits_are_json(command, examples):
    ran = command(
        "inspect", "--json", examples / "sd15-shapes", "--vram", "2GiB", "--batch", "2",
        "--dtype", "float32",
    )  # fmt: skip
    (fit,) = ran.result["fits"]
    assert (fit["vram_nbytes"], fit["batch"], fit["compute"]) == (2 << 30, 2, "F32")
    assert fit["level"] == fit["levels"][0]["level"] == "none"
    assert {one["name"] for one in fit["stages"]} == {"encode", "denoise", "decode"}
    assert all(one["derivation"] for one in fit["stages"])


@pytest.mark.parametrize(
    "wrong",
    [
        ("--vram", "lots"),
        ("--size", "0x4"),
        ("--size", "big"),
        ("--batch", "0"),
        ("--size", "70000x8"),
        ("--dtype", "int4"),
    ],
)
def test_wrong_values_are_usage_errors(command, examples, wrong):
    ran = command("inspect", examples / "sd15-shapes", *wrong)
    assert ran.code == 2


def test_two_files_are_compared(command, examples):
    ran = command(
        "inspect", examples / "sd15-shapes", "--with", examples / "flux1-shapes", "--with",
        examples / "sd15-shapes",
    )  # fmt: skip
    assert ran.code == 0
    assert "different latent spaces" in ran.out
    assert "instead: pixels" in ran.out
    assert "the same latent space" in ran.out


def test_comparisons_are_json(command, examples, unet):
    ran = command("inspect", "--json", unet, "--with", examples / "sd15-shapes")
    (pair,) = ran.result["latents"]
    assert pair["verdict"] == "same"
    assert pair["first"]["spaces"] == ["sd"]


def test_an_unreadable_file_is_the_usual_error(command, examples, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\0" * 20)
    for options in (("--vram", "8GiB"), ("--with", examples / "sd15-shapes")):
        ran = command("inspect", bad, *options)
        assert ran.code == 1
        assert "bad.safetensors" in ran.err


def test_one_unreadable_file_of_several_does_not_hide_the_others(command, examples, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\0" * 20)
    ran = command("inspect", bad, examples / "sd15-shapes", "--vram", "8GiB")
    assert ran.code == 1
    assert "fits in 8.00 GiB" in ran.out
    assert "bad.safetensors" in ran.err


@pytest.mark.parametrize("other", [("--audit",), ("--for", "diffusers"), ("--with", "x")])
def test_two_questions_at_once_are_refused(command, examples, other):
    ran = command("inspect", examples / "sd15-shapes", "--vram", "8GiB", *other)
    assert ran.code == 2
    assert "one at a time" in ran.err
