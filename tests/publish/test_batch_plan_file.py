"""A plan file is read as hostile input, and every problem in it is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffquant.core.errors import MalformedFile, UsageError
from diffquant.publish.batch.items import items_of
from diffquant.publish.batch.plan_file import UnknownInPlanError, read_plan_file
from diffquant.publish.batch.settings import KEYS

EXAMPLES = Path(__file__).parents[2] / "examples"
FLUX = EXAMPLES / "flux1-shapes"


@pytest.fixture
def plan(tmp_path):
    """Write a plan beside the sources a.safetensors and b.safetensors; returns its path."""
    for name in ("a.safetensors", "b.safetensors", "m.gguf", "p.txt", "style.safetensors"):
        (tmp_path / name).write_bytes(b"x")

    def write(text, output="out"):
        path = tmp_path / "plan.toml"
        path.write_text(f'output = "{output}"\n{text}', encoding="utf-8")
        return path

    return write


def model(*lines, source="a.safetensors", types='["q8_0"]'):
    return "\n".join(("[[model]]", f'source = "{source}"', f"types = {types}", *lines, ""))


def told(path):
    with pytest.raises((UsageError, UnknownInPlanError)) as found:
        items_of(read_plan_file(path))
    return str(found.value)


def test_paths_are_relative_to_the_plan_file(plan, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    path = plan(model('imatrix = "m.gguf"', 'lora = { file = "style.safetensors", weight = 0.5 }'))
    file = read_plan_file(path)
    (one,) = file.models
    assert file.output == tmp_path / "out"
    assert one.settings.source == tmp_path / "a.safetensors"
    assert one.settings.imatrix == (tmp_path / "m.gguf",)
    assert one.settings.lora[0].path == tmp_path / "style.safetensors"
    assert (one.settings.lora[0].weight, one.settings.lora[0].encoder_weight) == (0.5, 0.5)
    assert [item.path for (item,) in items_of(file)] == [tmp_path / "out" / "a-Q8_0.gguf"]


def test_a_table_overrides_the_defaults_key_by_key(plan):
    text = '[defaults]\ntypes = "q8_0"\ntargets = ["sdcpp", "universal"]\npolicy = "tuned"\n'
    text += '[[model]]\nsource = "a.safetensors"\n'
    text += '[[model]]\nsource = "b.safetensors"\nset = "q2-q8"\ntarget = "universal"\n'
    first, second = read_plan_file(plan(text)).models
    assert [one.label for one in first.settings.types] == ["q8_0"]
    assert first.settings.targets == ("sdcpp", "universal")
    assert len(second.settings.types) == 13
    assert second.settings.targets == ("universal",)
    assert first.settings.policy == second.settings.policy == "tuned"


def test_a_source_in_a_hubs_cache_is_called_as_its_link_is(plan, tmp_path):
    (tmp_path / "0d4f1c2a").write_bytes(b"x")
    (tmp_path / "flux.safetensors").symlink_to(tmp_path / "0d4f1c2a")
    ((item,),) = items_of(read_plan_file(plan(model(source="flux.safetensors"))))
    assert item.name == "flux-Q8_0.gguf"


def test_several_targets_are_folders(plan):
    path = plan(model('targets = ["sdcpp", "universal"]', 'name = "mine"'))
    (row,) = items_of(read_plan_file(path))
    assert [item.name for item in row] == ["sdcpp/mine-Q8_0.gguf", "universal/mine-Q8_0.gguf"]


def test_every_problem_is_told_at_once_with_its_table_and_line(plan):
    text = model('tpyes = ["q8_0"]', "pure = 1", 'name = "../x"')
    text += model('targets = ["sdcpp"]', 'target = "sdcp"', source="none.safetensors")
    text += model("imatrix = []", 'verify = "looks"', types='["q8_0", "Q8_0"]')
    message = told(plan("outptu = 1\n[defaults]\nsource = 'x'\n" + text))
    for part in (
        "plan.toml: ",
        "unknown key 'outptu', did you mean 'output'?",
        "[defaults]: unknown key 'source'",
        "[[model]] 1 (line 5): unknown key 'tpyes', did you mean 'types'?",
        "[[model]] 1 (line 5): `pure`: expected true or false",
        "[[model]] 1 (line 5): `name`: expected a file name without its extension",
        "[[model]] 2 (line 11): `source`: expected a file that exists; there is no ",
        "[[model]] 2 (line 11): `target`: expected one of universal",
        "did you mean 'sdcpp'?",
        "[[model]] 3 (line 16): `imatrix`: expected at least one value",
        "[[model]] 3 (line 16): `verify`: expected one of none, load, tensors, image",
        "[[model]] 3 (line 16): `types`: expected each value once; q8_0 comes twice",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "expected [[model]] tables"),
        ("model = 3", "expected [[model]] tables"),
        ("[model]\nsource = 'a.safetensors'", "expected [[model]] tables"),
        ("defaults = 3\n" + model(), "`defaults`: expected a table"),
        ("[[model]]\ntypes = 'q8_0'", "[[model]] 1 (line 2): `source` is missing"),
        ("[[model]]\nsource = 'a.safetensors'", "no `types` and no `set`"),
        (model(types='["q9"]'), "unknown type 'q9'"),
        (model('set = "q2-q8"'), "type q8_0 is in `types` and in `set`"),
        (model('set = "all"'), "unknown set of types 'all'"),
        (model('container = "folder"'), "type q8_0 cannot go into a Diffusers folder"),
        (model('tensor_types = ["x"]'), "expected REGEX=FORMAT"),
        (model('exclude = ["("]'), "not a regular expression"),
        (model("lora = { file = 'style.safetensors', weight = nan }"), "`lora`: expected a number"),
        (model("lora = { path = 'style.safetensors' }"), "`lora`: expected a table such as"),
        (model('prompts = "p.txt"'), '`prompts` are for verify = "image"'),
        (model("bias_correction = true"), "`bias_correction` needs `inputs`"),
        (model('name = "con"'), "`name`: expected a file name"),
        (model(r'name = "a\u001bb"'), "`name`: expected a file name"),
        (model('base = "a\\u0000b"'), "`base`: expected a text"),
        (model('targets = ["sdcpp"]', 'target = "sdcpp"'), "give `target` or `targets`, not both"),
    ],
)
def test_what_makes_no_sense_is_told(plan, text, part):
    assert part in told(plan(text))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (model(types='["q9"]'), 4),
        (model(types='["q9"]', source="b.safetensors") + model('target = "kobold"'), 4),
        ('[[model]]\nsource = "a.safetensors"\nset = "all"\n', 4),
        (model('targets = ["sdcpp", "kobold"]'), 4),
        (model('tensor_types = ["x=q9"]'), 4),
        (model("target = 3"), 2),
        (model('tensor_types = ["x"]'), 2),
        (model('container = "zip"'), 2),
        (model("pure = 1", types='["q9"]'), 2),
    ],
)
def test_names_that_nobody_knows_end_as_they_do_in_quantize(plan, text, code):
    with pytest.raises((UsageError, UnknownInPlanError)) as found:
        read_plan_file(plan(text))
    assert found.value.exit_code == code
    assert "no `types`" not in str(found.value)  # they are there, and wrong


def test_outputs_that_collide_are_told_also_by_case(plan):
    message = told(plan(model('name = "x"') + model('name = "X"', source="b.safetensors")))
    assert "[[model]] 2 (line 6): X-Q8_0.gguf is an output of [[model]] 1 (line 2) too" in message


@pytest.mark.parametrize("output", [".", "sources/more"])
def test_outputs_in_the_way_of_what_is_read_are_told(plan, tmp_path, output):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "more").mkdir()
    (tmp_path / "x-Q8_0.gguf").write_bytes(b"x")
    text = model('name = "x"') + model(source="x-Q8_0.gguf") + model(source="sources")
    message = told(plan(text, output))
    reader = "[[model]] 2" if output == "." else "[[model]] 3"
    assert "[[model]] 1 (line 2): output " in message
    assert f"which is read by {reader}" in message


def test_a_link_to_a_source_is_the_source(plan, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a-Q8_0.gguf").symlink_to(tmp_path / "b.safetensors")
    assert "in each other's way" in told(plan(model() + model(source="b.safetensors")))


def test_an_output_may_not_hold_the_plan(plan, tmp_path):
    folder = tmp_path / "x-bf16"
    folder.mkdir()
    path = plan(model('container = "folder"', 'name = "x"', types='"bf16"'), "..")
    moved = path.rename(folder / "plan.toml")
    (tmp_path / "a.safetensors").rename(folder / "a.safetensors")
    assert "in each other's way" in told(moved)


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (b"output = \xff\n", "not UTF-8 at byte 9"),
        (b"output = [" + b"[" * 50_000, "nested too deep"),
        (b"x = " + b"{a=" * 40_000, "nested too deep"),
        (b"output = 'x'\noutput = 'y'\n", "not TOML: Cannot overwrite a value (at line 2"),
        (b"output = " + b"9" * 100_000, "not TOML: "),
        (b"#" * (1 << 19), "larger than"),
        (b"\0", "not TOML"),
        (b"x = 1\n" + b"a." * 100_000 + b"b = 1\n", "more than 256 dots in line 2"),
    ],
)
def test_a_hostile_file_is_malformed(tmp_path, raw, part):
    path = tmp_path / "plan.toml"
    path.write_bytes(raw)
    with pytest.raises(MalformedFile, match=r"plan\.toml") as found:
        read_plan_file(path)
    assert part in str(found.value)


@pytest.mark.parametrize("value", ["a." * 200 + "b = 1", "defaults" + ".x" * 200 + " = 1"])
def test_a_deep_key_is_told_and_not_followed(plan, value):
    assert "unknown key" in told(plan(f"{value}\n{model()}"))


def test_a_folder_or_nothing_is_no_plan(tmp_path):
    for path in (tmp_path, tmp_path / "none.toml"):
        with pytest.raises(MalformedFile, match="no such file"):
            read_plan_file(path)


def test_headers_in_a_text_do_not_move_lines(plan):
    text = "[defaults]\narch = '''\n[[model]]\n'''\n" + model("pure = 1")
    assert "[[model]] 1: `pure`" in told(plan(text))


def test_every_key_is_documented():
    text = (EXAMPLES.parent / "docs" / "batch.md").read_text(encoding="utf-8")
    for name in KEYS:
        assert f"`{name}`" in text, name
