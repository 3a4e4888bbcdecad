"""Tokenizers: made here from a toy vocabulary, and against transformers on the real ones."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from diffquant.core.errors import MalformedFile
from diffquant.runtime.tokenizers import load_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
PROMPTS = [
    "",
    "a photo of a red fox in the snow, 35mm",
    "  Ünïcode\tand\n\nwhite   space — 日本語 🦊 it's 1234!! ",
    "<|startoftext|> inside a prompt <|endoftext|>",
    "don't (stop) [the]: 50% <extra_id_3> </s> music" * 8,
]
SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def byte_alphabet():
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def toy_clip(folder, **config):
    letters = byte_alphabet()
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", *SPECIAL]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    settings = {"eos_token": SPECIAL[1], "pad_token": SPECIAL[1], "model_max_length": 8, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return words


def test_clip_surrounds_and_pads(tmp_path):
    words = toy_clip(tmp_path)
    tokens = load_tokenizer(tmp_path).encode(["CAT  a"])
    assert tokens.ids.dtype == torch.int64
    names = [words[i] for i in tokens.ids[0]]
    assert names == [SPECIAL[0], "cat</w>", "a</w>", *[SPECIAL[1]] * 5]
    assert tokens.truncated == ("",)


def test_what_does_not_fit_is_returned(tmp_path):
    words = toy_clip(tmp_path)
    tokens = load_tokenizer(tmp_path).encode(["cat " * 6 + "b c", "cat"])
    assert tokens.truncated == ("b c", "")
    assert [words[i] for i in tokens.ids[0]] == [SPECIAL[0], *["cat</w>"] * 6, SPECIAL[1]]
    longer = load_tokenizer(tmp_path).encode(["cat " * 6 + "b c"], length=10)
    assert longer.truncated == ("",)


@pytest.mark.parametrize("listed", [True, False])
def test_old_folders_pad_by_special_tokens_map(tmp_path, listed):
    words = toy_clip(tmp_path, **({"added_tokens_decoder": {}} if listed else {}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    ids = load_tokenizer(tmp_path).encode(["cat"]).ids[0]
    assert words[ids[-1]] == (SPECIAL[1] if listed else "!")


def test_unusable_folders_are_refused(tmp_path):
    with pytest.raises(MalformedFile, match=r"expected tokenizer\.json"):
        load_tokenizer(tmp_path)
    toy_clip(tmp_path, pad_token="<nowhere>")
    with pytest.raises(MalformedFile, match="'<nowhere>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("one two three\n")
    with pytest.raises(MalformedFile, match=r"merges\.txt, line 1: expected two tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(MalformedFile, match="not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.oracle
@pytest.mark.parametrize("length", [77, 12])
@pytest.mark.parametrize("name", ["clip_l", "openclip_bigg", "t5_xxl"])
def test_real_vocabularies_equal_transformers(name, length, oracle, tmp_path):
    if not (REAL / name).is_dir():
        pytest.skip("the reference tokenizers are not here")
    for file in (REAL / name).iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    kind = "T5TokenizerFast" if name == "t5_xxl" else "CLIPTokenizer"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = getattr(oracle.transformers, kind).from_pretrained(tmp_path)
    wanted = reference(
        PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    found = load_tokenizer(tmp_path).encode(PROMPTS, length=length)
    assert torch.equal(found.ids, wanted)
    assert bool(found.truncated[-1])
    assert found.truncated[0] == ""


@pytest.mark.oracle
def test_saved_fast_tokenizers_equal_their_sources(oracle, tmp_path):
    if not REAL.is_dir():
        pytest.skip("the reference tokenizers are not here")
    reference = oracle.transformers.CLIPTokenizer.from_pretrained(REAL / "clip_l")
    reference.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    found = load_tokenizer(tmp_path).encode(PROMPTS).ids
    assert torch.equal(found, load_tokenizer(REAL / "clip_l").encode(PROMPTS).ids)
