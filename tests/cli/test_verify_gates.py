"""Gates of `verify`: exit codes, what is refused, and gates that cannot be kept or cannot fail."""

import pytest

from diffquant.runtime.scorers import DEMO_PROMPTS


@pytest.fixture
def judged(command, gguf_file, examples, tmp_path):
    """Run verify on flux1-shapes as q4_k_s."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(DEMO_PROMPTS[1])
    drawing = ["--prompts", prompts, "--seeds", "0", "--steps", 2, "--size", 64]

    def run(*options, level="image"):
        return command(
            "verify", gguf_file, "--against", examples / "flux1-shapes", "--level", level,
            *(drawing if level == "image" else []), *options,
        )  # fmt: skip

    return run


def test_gates_that_are_kept_are_listed_with_their_controls(judged):
    found = judged("--min-psnr", 15, "--max-flip", 0.3, "--min-ssim", 0.6, "--max-rel-error", 0.1,
                   "--json")  # fmt: skip
    assert found.code == 0, found.out
    weights, pictures = found.result["gates"], found.result["image"]["gates"]
    assert [gate["gate"] for gate in weights] == ["max_rel_error"]
    assert weights[0]["value"] == found.result["tensors"]["error"] < 0.1 < weights[0]["control"]
    assert [gate["gate"] for gate in pictures] == ["min_ssim", "max_flip"]
    assert all(gate["verdict"] == "pass" for gate in pictures)
    ssim, flip = pictures
    assert ssim["control"] < 0.6 < ssim["value"]
    assert flip["value"] < 0.3 < flip["control"]
    assert found.result["image"]["metrics"].keys() == {"ssim", "flip"}


def test_gates_that_are_not_kept_cannot_fail_or_have_no_metric_end_in_3(judged):
    found = judged("--min-psnr", 15, "--max-flip", 0.001, "--min-ssim", -1, "--max-lpips", 0.5)
    assert found.code == 3
    assert "fail: --max-flip 0.001" in found.out
    assert "flip 0.0" in found.out
    assert "is above the gate of 0.001" in found.out
    assert "--min-ssim: the control" in found.out
    assert "this gate cannot fail" in found.out
    assert "--max-lpips is not kept: pictures are" in found.out or "no weights" in found.out
    assert found.out.rstrip().endswith("verdict  fail")


def test_the_weights_gate_needs_no_pictures(judged):
    assert judged("--max-rel-error", 0.1, level="tensors").code == 0
    strict = judged("--max-rel-error", 0.01, level="tensors")
    assert strict.code == 3
    assert "weight error 0.07" in strict.out
    loose = judged("--max-rel-error", 5, level="tensors")
    assert loose.code == 3
    assert "this gate cannot fail" in loose.out


@pytest.mark.parametrize(
    ("options", "level", "told"),
    [
        (["--max-flip", 0.1], "tensors", "--max-flip judges pictures"),
        (["--max-rel-error", 0.1], "load", "--max-rel-error compares weights"),
        (["--min-psnr", "nan"], "image", "--min-psnr nan: expected a finite number"),
        (["--max-lpips", "inf"], "image", "--max-lpips inf: expected a finite number"),
        (["--max-flip", "x"], "image", "'x' is not a valid float"),
        (["--synthetic"], "tensors", "--synthetic draws pictures"),
    ],
)
def test_gates_that_make_no_sense_are_refused(judged, options, level, told):
    found = judged(*options, level=level)
    assert found.code == 2
    assert told in found.err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"1, 2\nx\n", "expected numbers with commas"),
        (b"# none\n", "no seeds in it"),
        (b"-1\n", "at least 0"),
        (b"\xff\xfe\n", "not UTF-8"),
        (b"1\n" * (1 << 20), "no list of prompts or seeds"),
    ],
)
def test_a_file_of_seeds_is_checked(judged, tmp_path, content, told):
    seeds = tmp_path / "seeds.txt"
    seeds.write_bytes(content)
    found = judged("--seeds", seeds)
    assert found.code == 2
    assert told in found.err


def test_a_gate_on_pictures_needs_pictures(command, tmp_path):
    ran = command("verify", "x", "--against", "y", "--level", "tensors", "--min-psnr", "99")
    assert ran.code == 2
    assert "--min-psnr judges pictures" in ran.err
