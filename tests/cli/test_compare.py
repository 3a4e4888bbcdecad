"""`diffquant compare`: tables, files it writes, gates and what it refuses."""

import csv
import io
import sys
from dataclasses import replace
from types import ModuleType

import pytest

from diffquant.cli.view_compare import render_comparison_tables
from diffquant.publish.compare_tables import csv_text, markdown_text
from diffquant.runtime.comparison import Comparison, ComparisonPictures, LayerError, Row, Value
from diffquant.runtime.scorers import DEMO_PROMPTS


@pytest.fixture
def drawn(monkeypatch):
    """Stand in for drawing: what compare_files was asked, and the comparison it gives."""
    asked = []

    def compare_files(reference, candidates, settings, *, progress):
        asked.append((reference, candidates, settings))
        return COMPARISON, ComparisonPictures((), {})

    monkeypatch.setattr("diffquant.runtime.compare_files.compare_files", compare_files)
    return asked


def row(name, kind="candidate", **fields):
    values = {
        "psnr": Value(42.25, 41.0, 44.0, 40.5),
        "ssim": Value(0.99871, 0.9981, 0.9992, 0.997),
        "flip": Value(0.0213, 0.0181, 0.0253, 0.031),
        "ssimulacra2": Value(85.61, 84.2, 86.9, 80.0),
        "prompt": Value(1.0, 1.0, 1.0, 1.0),
    }
    return Row(name, kind, **{"values": values, "seconds": 0.5, "latent_error": 0.01, **fields})


BROKEN = {"psnr": Value(float("nan"))}
COMPARISON = Comparison(
    reference="flux1-shapes",
    reference_nbytes=9_771_302,
    architecture="flux1",
    variant="dev",
    part="denoiser",
    prompts=DEMO_PROMPTS[:2],
    seeds=(0, 1),
    steps=12,
    cfg=None,
    size=(128, 128),
    metrics=("psnr", "ssim", "flip", "ssimulacra2", "lpips", "prompt"),
    missing={"lpips": "no weights of AlexNet: give them with --lpips-weights FILE"},
    gates={},
    rows=(
        row(
            "a-very-long-name-of-a-published-checkpoint-in-the-style-of-the-hub-q4_k_s.gguf",
            type="q4_k_s",
            nbytes=3_123_232,
            bits_per_weight=6.3157,
            weight_error=0.0715,
            peak_mib=335.7,
            layers=(LayerError("double_blocks.0.a.weight", "denoiser", "q4_k", 0.0752, 1000),),
        ),
        row("=cmd|' /C calc'!A0\x1b[31m", identical=True, values={"psnr": Value(None)}),
        row(
            "b|ad`<b>.gguf", verdict="fail", values={"psnr": Value(float("nan"))}, problems=("x|y",)
        ),
        row("noise floor", "floor"),
        row("control", "control", problems=("scales of double_blocks.0 shuffled",)),
    ),
    engine="diffquant 0.1.0",
    reference_values={"prompt": Value(1.0)},
    reference_seconds=0.25,
    reference_peak_mib=320.0,
)


def test_both_tables_fit_100_columns_and_a_missing_metric_keeps_its_column(capsys):
    render_comparison_tables(COMPARISON, verbose=True)
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 100
    assert "\x1b" not in out
    assert "missing" in out
    assert "LPIPS is missing: no weights of AlexNet" in " ".join(out.split())
    head = next(line for line in out.splitlines() if line.startswith("file"))
    assert head.split() == ["file", "PSNR", "dB", "SSIM", "FLIP", "SSIMULACRA2", "LPIPS", "prompt",
                            "verdict"]  # fmt: skip
    first = next(line for line in out.splitlines() if line.startswith("a-very"))
    assert first.split()[1:] == ["42.2", "0.9987", "0.0213", "85.6", "missing", "1.000", "-"]
    assert "±1.5" in out  # half of 41 to 44
    assert "identical" in out
    assert "not finite" in out
    assert "double_blocks.0.a.weight" in out  # with -v


def test_csv_has_every_row_and_number_and_no_formula():
    rows = list(csv.DictReader(io.StringIO(csv_text(COMPARISON))))
    assert [one["kind"] for one in rows] == ["candidate"] * 3 + ["floor", "control"]
    assert float(rows[0]["psnr"]) == 42.25
    assert (rows[0]["psnr_low"], rows[0]["psnr_high"], rows[0]["psnr_worst"]) == (
        "41.0", "44.0", "40.5"
    )  # fmt: skip
    assert rows[0]["lpips"] == "missing"
    assert rows[1]["name"].startswith("'=cmd")
    assert (rows[1]["psnr"], rows[1]["identical"]) == ("", "yes")
    assert rows[2]["psnr"] == "nan"


def test_markdown_escapes_names_and_says_what_is_missing():
    text = markdown_text(COMPARISON)
    table = [line for line in text.splitlines() if line.startswith("|")]
    bars = {line.replace("\\|", "").count("|") for line in table}
    assert len(bars) == 1
    assert len(table) == 2 + len(COMPARISON.rows)
    assert "42.2 (41.0 to 44.0)" in text
    assert "LPIPS is missing: no weights of AlexNet" in text
    assert "<b>" not in text.replace("`b\\|ad'<b>.gguf`", "")
    assert "\x1b" not in text


def test_a_name_of_several_lines_is_shown_on_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # narrower ones cut the name
    name = "a\nb\t\x1b[31m\u202ec.gguf"
    (row, *others) = COMPARISON.rows
    odd = replace(row, name=name, problems=("x\ny",))
    made = replace(COMPARISON, reference=name, rows=(odd, *others))
    render_comparison_tables(made, verbose=True)
    told = capsys.readouterr().out
    escaped = r"a\nb\t\x1b[31m\u202ec.gguf"
    assert told.startswith(f"reference {escaped}: ")
    assert sum(line.startswith(f"{escaped} ") for line in told.splitlines()) == 2
    assert f"{escaped}: x\\ny" in told
    assert not any(line.startswith(r"b\t") for line in told.splitlines())
    assert f"`{escaped}`" in markdown_text(made)
    (found, *_) = csv.DictReader(io.StringIO(csv_text(made)))
    assert found["name"] == escaped


def test_options_reach_the_comparison(command, drawn, tmp_path):
    prompts, seeds = tmp_path / "prompts.txt", tmp_path / "seeds.txt"
    prompts.write_text(f"# two\n{DEMO_PROMPTS[0]}\n{DEMO_PROMPTS[1]}\n")
    seeds.write_text("3,4\n9\n")
    found = command(
        "compare", "ref", "a.gguf", "b.gguf", "--prompts", prompts, "--seeds", seeds, "--steps", 4,
        "--size", "64", "--only", "vae", "--max-flip", 0.1, "--min-psnr", 20, "--metrics",
        "psnr, lpips", "--json",
    )  # fmt: skip
    assert found.code == 3  # a row fails, and there are gates
    reference, candidates, settings = drawn[0]
    assert (str(reference), [str(one) for one in candidates]) == ("ref", ["a.gguf", "b.gguf"])
    assert settings.prompts == DEMO_PROMPTS[:2]
    assert settings.seeds == (3, 4, 9)
    assert (settings.size, settings.only, settings.steps) == ((64, 64), "vae", 4)
    assert settings.limits == {"max_flip": 0.1, "min_psnr": 20.0}
    assert settings.metrics == ("psnr", "lpips")
    assert not settings.keep_pictures  # they are for the page
    result = found.json["result"]
    assert result["missing"].keys() == {"lpips"}
    assert result["rows"][0]["values"]["psnr"]["low"] == 41.0
    assert result["rows"][2]["values"]["psnr"]["mean"] is None


def test_without_gates_the_exit_code_is_0_whatever_the_table_says(command, drawn):
    assert command("compare", "ref", "a.gguf", "--sampler", "ddim").code == 0
    assert drawn[0][2].sampler == "ddim"
    assert drawn[0][2].metrics == ("psnr", "ssim", "flip", "ssimulacra2", "lpips")


def test_files_are_written_whole_and_not_over_others(command, drawn, tmp_path, monkeypatch):
    page = ModuleType("diffquant.publish.compare_page")
    page.render_comparison = lambda comparison, pictures, path: path.write_text(
        comparison.reference
    )
    monkeypatch.setitem(sys.modules, "diffquant.publish.compare_page", page)
    outputs = [tmp_path / name for name in ("t.csv", "t.md", "t.html")]
    flags = ["--csv", outputs[0], "--markdown", outputs[1], "--html", outputs[2]]
    assert command("compare", "ref", "a.gguf", *flags).code == 0
    assert outputs[0].read_text() == csv_text(COMPARISON)
    assert outputs[1].read_text() == markdown_text(COMPARISON)
    assert outputs[2].read_text() == "flux1-shapes"
    again = command("compare", "ref", "a.gguf", *flags)
    assert again.code == 2
    assert "exists; use --force" in again.err
    assert len(drawn) == 1  # said before anything was drawn
    assert drawn[0][2].keep_pictures
    assert command("compare", "ref", "a.gguf", *flags, "--force").code == 0

    def interrupted(comparison, pictures, path):
        path.write_text("half")
        raise KeyboardInterrupt

    page.render_comparison = interrupted
    assert command("compare", "ref", "a.gguf", *flags, "--force").code == 130
    assert outputs[2].read_text() == "flux1-shapes"
    left = {one.name for one in tmp_path.iterdir()} - {".cache"}
    assert left == {one.name for one in outputs}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["ref"], 2, "Missing argument 'CANDIDATES...'"),
        (["ref", "a", "--csv", "a"], 2, "is read or written already"),
        (["ref", "a", "--csv", "x", "--markdown", "x"], 2, "is read or written already"),
        (["ref", "a", "--csv", "nowhere/x.csv"], 2, "nowhere"),
        (["ref", "a", "--seeds", "x"], 2, "expected numbers with commas"),
        (["ref", "a", "--only", "unet"], 2, "'unet' is not one of"),
        (["ref", "a", "--metrics", ""], 4, "unknown metric ''"),
        (["nothing-here", "neither"], 1, "nothing-here"),
    ],
)
def test_wrong_requests_say_what_is_wrong(command, arguments, code, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = command("compare", *arguments)
    assert found.code == code
    assert told in found.err


def test_unknown_metrics_are_named_before_pictures_are_drawn(command, examples, gguf_file):
    found = command("compare", examples / "flux1-shapes", gguf_file, "--metrics", "psnr,vmaf")
    assert found.code == 4
    assert "unknown metric 'vmaf'" in found.err


def test_a_comparison_of_real_files_ends_in_tables(command, examples, gguf_file, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text(DEMO_PROMPTS[1])
    found = command(
        "compare", examples / "flux1-shapes", gguf_file, "--prompts", prompts, "--seeds", 0,
        "--steps", 2, "--size", 64, "--min-psnr", 15, "--metrics", "psnr,flip,lpips",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert "flux.gguf" in found.out
    assert "noise floor" in found.out
    assert "q4_k_s" in found.out


def test_what_is_read_is_not_written_over(command, drawn, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    index, seeds, vae = base / "model_index.json", tmp_path / "seeds.txt", tmp_path / "vae.bin"
    for path in (index, seeds, vae):
        path.write_text("0")
    flags = ["--base", base, "--vae", vae, "--seeds", seeds, "--force"]
    for path, told in ((index, "is a part of"), (seeds, "is read or"), (vae, "is read or")):
        ran = command("compare", "ref", "a.gguf", *flags, "--csv", path)
        assert (ran.code, told in ran.err) == (2, True)
        assert path.read_text() == "0"
    assert command("compare", "ref", "a.gguf", "--size", "\u00b2x2").code == 2
