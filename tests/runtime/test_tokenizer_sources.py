"""Tokenizers by their places: folders, GGUF headers, a hub; hostile files of each."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from diffquant.convert.encoders.tokenizer import tokenizer_pairs
from diffquant.convert.jobs import container_for, run_job
from diffquant.convert.plan import Request
from diffquant.core.errors import MalformedFile, UsageError
from diffquant.io import open_source
from diffquant.io.gguf_values import GgufArray, GgufValue
from diffquant.runtime.opening import open_pipeline
from diffquant.runtime.tokenizer_gguf import tokenizer_from_gguf
from diffquant.runtime.tokenizer_sources import HUB_TOKENIZERS
from diffquant.runtime.tokenizers import TOKENIZER_FILES, load_tokenizer, tokenizer_from_files

EXAMPLES = Path(__file__).parents[2] / "examples"
SD15, FLUX = EXAMPLES / "sd15-shapes", EXAMPLES / "flux1-shapes"
REAL = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
AWKWARD = [
    "",
    "a photo of a red fox in the snow, 35mm",
    "  Ünïcode\tand\n\nwhite   space — 日本語 🦊👩‍👩‍👧 it's 1234!! ",
    "a\x00b\x07c\x1bd\u200bzero\u202ebidi",
    "   ",
    "\n\n\r\n x \r",
    "<|im_start|>user\nhi<|im_end|> </s> <pad> <extra_id_0> <unk>",
    "<|startoftext|> inside a prompt <|endoftext|>!",
    "ｆｕｌｌｗｉｄｔｈ ﬁ ① é e\u0301 İıſß",
    "ten kilobytes " * 720,
]
# The demo's T5 has NFKC and no table of characters, so GGUF cannot say what these leave out.
SAID = [text for text in AWKWARD if text.isascii() and text.isprintable()]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFQUANT_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / ".cache"


def files_of(folder, *left_out):
    names = [n for n in TOKENIZER_FILES if n not in left_out and (folder / n).is_file()]
    return {name: (folder / name).read_bytes() for name in names}


def bare(tokenizer, texts=AWKWARD):
    return [tokenizer.backend.encode(text, add_special_tokens=False).ids for text in texts]


def decoded(pairs):
    """Pairs as a reader of the header sees them."""
    return {k: v.value if isinstance(v, GgufValue) else v for k, v in pairs.items()}


def real(name):
    if not (REAL / name).is_dir():
        pytest.skip("the reference tokenizers are not here")
    return REAL / name


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "kind", "left_out"),
    [
        ("clip_l", "CLIPTokenizer", ()),
        ("openclip_bigg", "CLIPTokenizer", ()),
        ("t5_xxl", "T5TokenizerFast", ()),
        ("t5_xxl", "T5TokenizerFast", ("tokenizer.json",)),  # spiece.model is left
        ("qwen2.5", "Qwen2Tokenizer", ()),
    ],
)
def test_awkward_texts_equal_transformers(oracle, name, kind, left_out):
    reference = getattr(oracle.transformers, kind).from_pretrained(real(name))
    found = tokenizer_from_files(files_of(real(name), *left_out), name)
    wanted = [reference(text).input_ids for text in AWKWARD]
    ours = [[*found.prefix, *ids, *found.suffix] for ids in bare(found)]
    assert ours == wanted
    assert found.pad == reference.pad_token_id


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        (SD15 / "tokenizer", "clip_bpe"),
        (FLUX / "tokenizer_2", "unigram"),
        (EXAMPLES / "qwen-image-shapes" / "tokenizer", "bpe"),
    ],
    ids=["clip", "t5", "qwen"],
)
def test_a_gguf_header_gives_the_same_ids(folder, kind):
    plain = load_tokenizer(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    pairs, _ = tokenizer_pairs(kind, files, plain.backend.get_vocab_size() + 3, {})
    found = tokenizer_from_gguf(decoded(pairs), folder)
    texts = SAID if kind == "unigram" else AWKWARD
    assert bare(found, texts) == bare(plain, texts)
    assert (found.prefix, found.suffix, found.pad) == (plain.prefix, plain.suffix, plain.pad)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "kind", "rows"), [("t5_xxl", "unigram", 32128), ("qwen2.5", "bpe", 152064)]
)
def test_a_real_gguf_header_gives_the_same_ids(name, kind, rows):
    folder = real(name)
    plain = load_tokenizer(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    pairs, _ = tokenizer_pairs(kind, files, rows, {})
    found = tokenizer_from_gguf(decoded(pairs), folder)
    assert bare(found) == bare(plain)
    assert (found.suffix, found.pad) == (plain.suffix, plain.pad)


def test_words_and_merges_of_qwen_equal_its_tokenizer_json():
    folder = EXAMPLES / "qwen-image-shapes" / "tokenizer"
    plain = load_tokenizer(folder)
    found = tokenizer_from_files(files_of(folder, "tokenizer.json"), folder)
    assert bare(found) == bare(plain)
    assert (found.prefix, found.suffix, found.pad) == ((), (), plain.pad)


def test_a_model_is_opened_with_the_tokenizer_of_a_gguf_encoder(tmp_path):
    encoder = tmp_path / "t5.gguf"
    run_job(FLUX, encoder, Request("gguf", parts=("text_encoder_2",)))
    base = tmp_path / "base"
    base.mkdir()
    for path in FLUX.iterdir():
        if path.name != "tokenizer_2":
            (base / path.name).symlink_to(path)
    with pytest.raises(UsageError, match=r"no tokenizer for its text_encoder_2, and hf://google"):
        open_pipeline(base)
    opened = open_pipeline(base, added={"text_encoder_2": encoder})
    found, plain = opened.pipeline.parts.tokenizers[1], load_tokenizer(FLUX / "tokenizer_2")
    assert bare(found, SAID) == bare(plain, SAID)


def single_file(tmp_path):
    out = tmp_path / "one.safetensors"
    run_job(SD15, out, Request(container=container_for(out)))
    (tmp_path / ".cache" / "sources.json").unlink(missing_ok=True)  # no way back to the folder
    return out


def test_a_single_file_needs_nothing_but_the_hub_once(tmp_path, monkeypatch, hub, cache):
    model = single_file(tmp_path)
    repo = HUB_TOKENIZERS["clip_text"].repo
    folder = SD15 / "tokenizer"
    hub.add(repo, files_of(folder, "tokenizer.json"))
    opened = open_pipeline(model)
    assert bare(opened.pipeline.parts.tokenizers[0]) == bare(load_tokenizer(folder))
    assert hub.requests("vocab.json")
    asked = len(hub.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    open_pipeline(model)
    assert len(hub.asked) == asked
    assert sorted(p.name for p in (cache / "tokenizers").rglob("*.*"))[-1] == "vocab.json"


def test_a_hub_that_cannot_serve_is_one_sentence_with_the_way_out(tmp_path, monkeypatch, hub):
    model = single_file(tmp_path)
    way_out = "--add tokenizer=DIR"
    with pytest.raises(UsageError, match=f"no repository openai.*{way_out}"):
        open_pipeline(model)
    repo = HUB_TOKENIZERS["clip_text"].repo
    hub.add(repo, {"vocab.json": b"{}"})
    with pytest.raises(UsageError, match=f"has no file 'merges.txt'.*{way_out}"):
        open_pipeline(model)
    hub.add(repo, {"merges.txt": b"x" * 2000})
    monkeypatch.setattr("hub_server.sha256_of", lambda content: "0" * 64)
    with pytest.raises(UsageError, match=f"checksum .* expected 000000000000.*{way_out}"):
        open_pipeline(model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=f"HF_HUB_OFFLINE forbids the network.*{way_out}"):
        open_pipeline(model)


def test_a_folder_can_be_named_and_has_to_fit(tmp_path):
    model = single_file(tmp_path)
    opened = open_pipeline(model, added={"tokenizer": SD15 / "tokenizer"})
    assert opened.pipeline.parts.tokenizers[0].length == 77
    with pytest.raises(UsageError, match="do not belong together"):
        open_pipeline(model, added={"tokenizer": FLUX / "tokenizer_2"})
    with pytest.raises(UsageError, match=r"sd15 takes no tokenizer_2 \(it has tokenizer\)"):
        open_pipeline(model, added={"tokenizer_2": SD15 / "tokenizer"})


def words(**more):
    table = {letter: i for i, letter in enumerate("abcdefgh")} | more
    return {"vocab.json": json.dumps(table).encode(), "merges.txt": b"a b\n"}


HOSTILE = {
    "not JSON": {"vocab.json": b"{", "merges.txt": b""},
    "expected a JSON object": {"vocab.json": b"[]", "merges.txt": b""},
    "not UTF-8": {"vocab.json": b"\xff", "merges.txt": b""},
    "0 tokens": {"vocab.json": b"{}", "merges.txt": b""},
    "no number below": words(x=-1),
    "no number below ": words(x="1"),
    "no number below  ": words(x=1 << 40),
    "two tokens have one id": words(x=0),
    "line 1: expected two tokens": {**words(), "merges.txt": b"a\n"},
    "not a BPE vocabulary": {**words(), "merges.txt": b"a zzz\n"},
    "an added token needs": {
        **words(),
        "tokenizer_config.json": b'{"added_tokens_decoder": {"x": {"content": "b"}}}',
    },
    "has id 0 in vocab.json and 9": {
        **words(),
        "tokenizer_config.json": b'{"added_tokens_decoder": {"9": {"content": "a"}}}',
    },
    "eos_token is no text": {**words(), "tokenizer_config.json": b'{"eos_token": 3}'},
    "not a SentencePiece model": {"spiece.model": b"\x0a\xff\xff\xff\xff\x0f"},
    "not a tokenizer": {"tokenizer.json": b'{"model": {"type": "BPE"}}'},
    "JSON": {"tokenizer_config.json": b"[" * 100_000, **words()},
}


@pytest.mark.parametrize("message", HOSTILE)
def test_hostile_folders_are_malformed_files(message):
    with pytest.raises(MalformedFile, match=message.strip()):
        tokenizer_from_files(HOSTILE[message], "somewhere")


def piece(text, score=0.0, kind=1):
    raw = text.encode()
    return (
        b"\x0a" + bytes([len(raw)]) + raw + b"\x15" + struct.pack("<f", score) + b"\x18"
        + bytes([kind])
    )  # fmt: skip


def spiece(*pieces, charsmap=b""):
    body = b"".join(b"\x0a" + bytes([len(one)]) + one for one in pieces)
    spec = b"\x12" + bytes([len(charsmap)]) + charsmap if charsmap else b""
    return body + (b"\x1a" + bytes([len(spec)]) + spec if spec else b"")


PIECES = (piece("<pad>", 0, 3), piece("</s>", 0, 3), piece("<unk>", 0, 2), piece("▁a", -1))


def test_a_small_sentencepiece_model_works():
    found = tokenizer_from_files({"spiece.model": spiece(*PIECES)}, "somewhere")
    assert bare(found, ["a  a </s>", "x"]) == [[3, 3, 1], [2]]
    assert (found.prefix, found.suffix, found.pad) == ((), (1,), 0)
    assert found.backend.token_to_id("<extra_id_0>") == 103


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (spiece(*PIECES, piece("b", float("nan"))), "not a finite float32"),
        (spiece(*PIECES, charsmap=b"\xff\xff\xff\x7fgarbage"), "not a Unigram"),
        (spiece(*PIECES, charsmap=b"\x04"), "not a Unigram"),
        (spiece(*PIECES)[:-1], "runs past the end"),
        (spiece(PIECES[0], PIECES[2]), "'</s>' is not in the vocabulary"),
    ],
    ids=["nan", "charsmap", "short charsmap", "cut", "no end"],
)
def test_hostile_sentencepiece_models_are_malformed_files(model, message):
    with pytest.raises(MalformedFile, match=message):
        tokenizer_from_files({"spiece.model": model}, "somewhere")


def test_damaged_sentencepiece_models_never_escape_as_anything_else():
    rng = np.random.default_rng(0)
    whole = spiece(*PIECES, charsmap=b"\x04\x00\x00\x00abcdefgh")
    for _ in range(300):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            tokenizer_from_files({"spiece.model": bytes(data)}, "x").encode(["a b"])
        except MalformedFile:
            continue


GGUF = {
    "tokenizer.ggml.model": "t5",
    "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "a"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0],
    "tokenizer.ggml.token_type": [3, 3, 2, 1],
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 0,
}
_TYPES = {"tokens": "str", "scores": "f32", "token_type": "i32", "merges": "str"}


def header(**changes):
    pairs = {**GGUF, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    found = {}
    for key, value in pairs.items():
        kind = _TYPES.get(key.rpartition(".")[2])
        if kind == "str" and isinstance(value, list):
            raw = [one.encode() for one in value]
            value = GgufArray("str", len(raw), b"".join(struct.pack("<Q", len(o)) + o for o in raw))
        elif isinstance(value, list):
            code = {"f32": "f", "i32": "i"}[kind]
            value = GgufArray(kind, len(value), struct.pack(f"<{len(value)}{code}", *value))
        if value is not None:
            found[key] = value
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0]}, "1 items for 4 tokens"),
        ({"scores": None}, "without tokenizer.ggml.scores"),
        ({"tokens": 7}, "expected an array of str"),
        ({"token_type": [1]}, "1 items for 4 tokens"),
        ({"eos_token_id": 99}, "eos_token_id is 99, with 4 tokens"),
        ({"eos_token_id": None}, "eos_token_id missing"),
        ({"padding_token_id": "x"}, "padding_token_id is 'x'"),
        ({"precompiled_charsmap": "text"}, "expected an array of u8"),
        ({"model": "llama"}, "its tokenizer is 'llama'"),
        ({"model": "gpt2", "pre": "llama-bpe"}, "'gpt2' 'llama-bpe'"),
        ({"model": "gpt2", "pre": "qwen2", "merges": ["a"]}, "no pair of tokens"),
        ({"model": "gpt2", "pre": "qwen2", "tokens": ["a", "a", "b", "c"]}, "comes twice"),
    ],
)
def test_hostile_gguf_headers_are_malformed_files(changes, message):
    assert tokenizer_from_gguf({}, "x") is None
    assert tokenizer_from_gguf(header(), "x").suffix == (1,)
    with pytest.raises(MalformedFile, match=message):
        tokenizer_from_gguf(header(**changes), "x")


def test_a_written_encoder_reads_back(tmp_path):
    out = tmp_path / "clip.gguf"
    run_job(FLUX, out, Request("gguf", parts=("text_encoder",)))
    with open_source(out) as source:
        found = tokenizer_from_gguf(source.metadata, out)
    plain = load_tokenizer(FLUX / "tokenizer")
    assert bare(found) == bare(plain)
    assert torch.equal(found.encode(["a red circle"]).ids, plain.encode(["a red circle"]).ids)
