"""Prompt syntax, chunks and weights, by the definitions of A1111 and ComfyUI written out here."""

import importlib.util
from pathlib import Path

import pytest
import torch

from diffquant.core.errors import UsageError
from diffquant.runtime.prompts import chunked, line, parse, plain_text, weigh
from diffquant.runtime.tokenizers import load_tokenizer


def pieces(prompt, style="comfy"):
    return [[(p.text, round(p.weight, 6)) for p in section] for section in parse(prompt, style)]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a fox", [[("a fox", 1.0)]]),
        ("", [[]]),
        ("a (fox)", [[("a ", 1.0), ("fox", 1.1)]]),
        ("((fox))", [[("fox", 1.21)]]),
        ("[fox] x", [[("fox", round(1 / 1.1, 6)), (" x", 1.0)]]),
        ("(fox:1.3)!", [[("fox", 1.3), ("!", 1.0)]]),
        ("(fox: .5 )", [[("fox", 0.5)]]),
        ("(fox:-1)", [[("fox", -1.0)]]),
        (r"a \(b\) \[c\] \\", [[("a (b) [c] \\", 1.0)]]),
        ("a (b", [[("a ", 1.0), ("b", 1.1)]]),
        ("a) b]", [[("a) b]", 1.0)]]),
        ("(a:b:1.2)", [[("a:b", 1.2)]]),
        ("(a:high)", [[("a:high", 1.1)]]),
        ("ratio 16:9", [[("ratio 16:9", 1.0)]]),
        ("a BREAK b", [[("a", 1.0)], [("b", 1.0)]]),
        ("BREAKFAST", [[("BREAKFAST", 1.0)]]),
        ("(a BREAK b:2)", [[("a", 2.0)], [("b", 2.0)]]),
    ],
)
@pytest.mark.parametrize("style", ["comfy", "a1111"])
def test_syntax(prompt, wanted, style):
    assert pieces(prompt, style) == wanted


def test_inner_weights_replace_in_comfy_and_multiply_in_a1111():
    assert pieces("(a (b:1.2) c:1.5)") == [[("a ", 1.5), ("b", 1.2), (" c", 1.5)]]
    assert pieces("(a (b:1.2) c:1.5)", "a1111") == [[("a ", 1.5), ("b", 1.8), (" c", 1.5)]]
    assert pieces("((b) c:2)") == [[("b", 2.2), (" c", 2.0)]]


def test_plain_reads_no_syntax():
    assert pieces(r"(a:2) BREAK \(", "plain") == [[(r"(a:2) BREAK \(", 1.0)]]
    assert plain_text("a (b:2) BREAK c") == "a b c"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("(" * 65 + "a", "nested deeper than 64"), (f"(a:{'9' * 400})", "no finite number")],
)
def test_hostile_prompts_are_refused(prompt, message):
    with pytest.raises(UsageError, match=message):
        parse(prompt)


@pytest.mark.parametrize(
    "prompt",
    ["x" + " " * 300_000 + "x", "(a:" + "1" * 300_000, "(a:1" + " " * 300_000, "()" * 100_000],
    ids=["spaces", "digits", "spaces in a weight", "brackets"],
)
def test_a_huge_prompt_takes_no_quadratic_time(prompt):
    assert len(parse(prompt)) == 1  # would take many minutes


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = Path(__file__).with_name("test_tokenizers.py")
    spec = importlib.util.spec_from_file_location("toy_tokenizers_of_prompts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    names = {"bos_token": module.SPECIAL[0], "unk_token": module.SPECIAL[1]}
    module.toy_clip(folder, model_max_length=12, **names)
    return load_tokenizer(folder)


def rows(tokenizer, prompt, style):
    """The words of each chunk, without what surrounds them."""
    found = []
    for chunk in chunked(tokenizer, prompt, style):
        assert len(chunk.ids) == len(chunk.weights) == 12
        assert chunk.ids[0] == tokenizer.prefix[0]
        end = chunk.ids.index(tokenizer.suffix[0])
        assert set(chunk.ids[end:]) <= {tokenizer.suffix[0], tokenizer.pad}
        assert set(chunk.weights[end:]) <= {1.0}
        found.append(tokenizer.backend.decode(list(chunk.ids[1:end])).replace("</w>", " ").strip())
    return found


def test_chunks_of_comfy_keep_words_whole_and_cut_very_long_ones(clip):
    sizes = {
        w: len(clip.backend.encode(w, add_special_tokens=False).ids) for w in ("xyz", "q" * 23)
    }
    assert sizes == {"xyz": 3, "q" * 23: 23}  # the toy vocabulary spells these out
    assert len(rows(clip, "xyz xyz xyz", "comfy")) == 1  # 9 of 10
    assert [len(row.replace(" ", "")) for row in rows(clip, "xyz " * 4, "comfy")] == [9, 3]
    assert [len(row) for row in rows(clip, "q" * 23, "comfy")] == [10, 10, 3]


def test_chunks_of_a1111_end_at_a_late_comma_and_cut_words(clip):
    assert [len(row.replace(" ", "")) for row in rows(clip, "xyz " * 4, "a1111")] == [10, 2]
    assert [row.replace(" ", "") for row in rows(clip, "xyz, xyz xyz xyz", "a1111")] == [
        "xyz,",
        "xyzxyzxyz",
    ]


def test_break_starts_a_chunk_and_weights_stay_with_their_words(clip):
    first, second = chunked(clip, "x BREAK (x:1.5) x", "comfy")
    assert set(first.weights) == {1.0}
    assert second.weights[:4] == (1.0, 1.5, 1.0, 1.0)
    with pytest.raises(UsageError, match="more than 64 chunks"):
        chunked(clip, "x BREAK " * 70, "comfy")


def test_plain_and_unweighted_lines_are_the_tokenizers_own(clip):
    for style in ("plain", "comfy", "a1111"):
        found = line(clip, "xyz xyz xyz xyz", style)
        own = clip.encode(["xyz xyz xyz xyz"])
        assert list(found.ids) == own.ids[0].tolist()
        assert found.truncated == own.truncated[0] != ""


def test_weights_by_definition():
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)) + 0.4
    empty, weights = torch.randn(5, 3), torch.ones(2, 5)
    weights[0, 2], weights[0, 3] = 1.4, 0.5
    comfy, mean = weigh(states, weights, empty, "comfy"), weigh(states, weights, empty, "a1111")
    for found in (comfy, mean):
        assert torch.equal(found[1], states[1])
    torch.testing.assert_close(comfy[0, 2], empty[2] + 1.4 * (states[0, 2] - empty[2]))
    torch.testing.assert_close(comfy[0, 4], states[0, 4])
    torch.testing.assert_close(mean[0].mean(), states[0].mean())
    torch.testing.assert_close(mean[0, 2] / mean[0, 4], 1.4 * states[0, 2] / states[0, 4])
