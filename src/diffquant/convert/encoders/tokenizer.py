"""tokenizer.ggml.*: a tokenizer as key-value pairs of a GGUF header, the way llama.cpp has them.

What can be there, and what is made of it:

==========================  ======================================================================
tokenizer.json, Unigram     model "t5": tokens, scores, types, character map, space handling
spiece.model                the same
tokenizer.json, BPE         model "gpt2", pre "qwen2": tokens, types, merges
vocab.json and merges.txt   the same; added tokens from tokenizer_config.json
==========================  ======================================================================

CLIP's BPE marks ends of words, for which llama.cpp has no model: tokens and merges are written
without one, as clip.cpp does. Special ids come from tokenizer_config.json, by text, else from
config.json. Ids that the vocabulary leaves open up to the table's rows are [PADn], unused.

Sources: ggml-org/llama.cpp convert_hf_to_gguf.py (T5Model.set_vocab, TextModel._set_vocab_gpt2,
get_vocab_base), gguf-py 0.19.0 gguf/vocab.py (SpecialVocab) and gguf/constants.py (TokenType).
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffquant.convert.encoders.spiece import Spiece, read_spiece
from diffquant.core.errors import MalformedFile
from diffquant.io.gguf_values import GgufArray, GgufValue, encode_string

__all__ = ["Files", "tokenizer_pairs"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5
_UNUSED_SCORE = -10000.0  # llama.cpp's T5Model.set_vocab
_MAX_TOKENS = 1 << 20
_MAX_DIGITS = 10  # of a token's number
_LARGEST = 3.4e38
_SPECIALS = {  # tokenizer_config.json's word -> GGUF's (gguf-py spells separator so)
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}
# The regular expression that llama.cpp runs for pre "qwen2" (src/llama-vocab.cpp).
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id, with what surrounds them."""

    texts: list[str]
    types: list[int]
    scores: list[float]
    pairs: dict[str, Any]
    lost: tuple[str, ...] = ()


def tokenizer_pairs(
    kind: str, files: Files, rows: int, config: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Pairs for a header, and what could not be said in them.

    Args:
        kind: "unigram", "bpe" or "clip_bpe".
        files: a tokenizer folder's files by name.
        rows: rows of the token embedding: the vocabulary is filled up to it.
        config: config.json of the model, for special ids that the tokenizer does not name.

    Returns:
        No pairs where `files` hold no tokenizer of that kind.

    Raises:
        MalformedFile: a file that is not what its name says, or more tokens than rows.
    """
    found = _READERS[kind](files)
    if found is None:
        return {}, ()
    count = len(found.texts)
    if count > rows or rows > _MAX_TOKENS:
        raise MalformedFile(
            f"the tokenizer has {count} tokens, the token embedding {rows} rows: they do not "
            "belong together; give the right folder with --base"
        )
    texts = [*found.texts, *(f"[PAD{i}]" for i in range(count, rows))]
    types = [*found.types, *(_UNUSED for _ in range(count, rows))]
    pairs = {key: value for key, value in found.pairs.items() if not key.endswith(".merges")}
    pairs["tokenizer.ggml.tokens"] = _strings(texts)
    if found.scores:
        scores = [*found.scores, *(_UNUSED_SCORE for _ in range(count, rows))]
        pairs["tokenizer.ggml.scores"] = GgufArray("f32", rows, struct.pack(f"<{rows}f", *scores))
    pairs["tokenizer.ggml.token_type"] = GgufArray("i32", rows, struct.pack(f"<{rows}i", *types))
    merges = found.pairs.get("tokenizer.ggml.merges")
    if merges is not None:
        pairs["tokenizer.ggml.merges"] = merges
    pairs |= _special(files, texts, config)
    return pairs, found.lost


def _unigram(files: Files) -> _Vocabulary | None:
    table = _json(files, "tokenizer.json")
    model = table.get("model")
    if isinstance(model, Mapping) and model.get("type") == "Unigram":
        return _unigram_from_json(table, model)
    name = next((one for one in ("spiece.model", "tokenizer.model") if one in files), "")
    return _unigram_from_spiece(read_spiece(files[name], name)) if name else None


def _unigram_from_spiece(model: Spiece) -> _Vocabulary | None:
    if not model.is_unigram:
        return None
    pairs = _t5_pairs(model.add_prefix, model.collapse_spaces, model.charsmap)
    return _Vocabulary(list(model.texts), list(model.types), list(model.scores), pairs)


def _unigram_from_json(table: Mapping[str, Any], model: Mapping[str, Any]) -> _Vocabulary:
    name = "tokenizer.json"
    rows = model.get("vocab")
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in rows
    ):
        raise MalformedFile(f"{name}: expected a vocabulary of [token, score] rows")
    scores = [row[1] if isinstance(row[1], int | float) else math.nan for row in rows]
    if not all(-_LARGEST < one < _LARGEST for one in scores):
        raise MalformedFile(f"{name}: a score in the vocabulary is no number, or beyond float32")
    texts, types = [row[0] for row in rows], [_NORMAL] * len(rows)
    for index, text, special in _added(table.get("added_tokens"), name):
        _place(texts, types, index, text, _CONTROL if special else _USER, name)
        scores += [0.0] * (len(texts) - len(scores))
    unknown = model.get("unk_id")
    if isinstance(unknown, int) and 0 <= unknown < len(types):
        types[unknown] = _UNKNOWN
    steps = [*_steps(table.get("normalizer")), *_steps(table.get("pre_tokenizer"))]
    kinds = [str(step.get("type")) for step in steps]
    charsmap = b""
    for step in steps:
        if step.get("type") == "Precompiled":
            charsmap = _base64(step.get("precompiled_charsmap"), name)
    prefix = any(
        step.get("type") == "Metaspace"
        and step.get("prepend_scheme", "always") != "never"
        and step.get("add_prefix_space", True)
        for step in steps
    )
    # Replace and WhitespaceSplit leave no run of spaces; where only the character map was exported,
    # SentencePiece's default holds, and T5's spiece.model has it.
    collapse = bool({"Replace", "WhitespaceSplit", "Precompiled"} & set(kinds))
    lost = tuple(
        f"tokenizer: normalizer {one} has no counterpart in GGUF"
        for one in kinds
        if one in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents")
    )
    return _Vocabulary(texts, types, scores, _t5_pairs(prefix, collapse, charsmap), lost)


def _t5_pairs(prefix: bool, collapse: bool, charsmap: bytes) -> dict[str, Any]:
    pairs: dict[str, Any] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": collapse,
        # T5 ends every text with </s>, and no file of its tokenizer says so as a flag.
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
    }
    if charsmap:
        pairs["tokenizer.ggml.precompiled_charsmap"] = GgufArray("u8", len(charsmap), charsmap)
    return pairs


def _bpe(files: Files) -> _Vocabulary | None:
    found = _bpe_parts(files)
    if found is None or any("</w>" in text for text in found.texts[:1000]):
        return None
    pairs = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", **found.pairs}
    lost: tuple[str, ...] = ()
    steps = _steps(_json(files, "tokenizer.json").get("pre_tokenizer"))
    patterns = [step["pattern"] for step in steps if isinstance(step.get("pattern"), Mapping)]
    if patterns and patterns[0].get("Regex") != _QWEN2_SPLIT:
        pairs["tokenizer.ggml.pre"] = "default"
        lost = ("tokenizer: it splits words by another rule than Qwen's: pre is 'default'",)
    return _Vocabulary(found.texts, found.types, [], pairs, lost)


def _clip_bpe(files: Files) -> _Vocabulary | None:
    """Tokens and merges without a model name, as clip.cpp has them."""
    found = _bpe_parts(files)
    if found is None or not any("</w>" in text for text in found.texts):
        return None
    return found


def _bpe_parts(files: Files) -> _Vocabulary | None:
    table = _json(files, "tokenizer.json")
    model = table.get("model")
    if isinstance(model, Mapping) and model.get("type") == "BPE":
        name, vocab, merges = "tokenizer.json", model.get("vocab"), model.get("merges")
    elif "vocab.json" in files and "merges.txt" in files:
        name, vocab = "vocab.json", _json(files, "vocab.json")
        lines = _text(files, "merges.txt").split("\n")
        merges = [line.rstrip("\r") for line in lines if line.strip()]
        merges = merges[1:] if merges and merges[0].startswith("#version") else merges
    else:
        return None
    added = table.get("added_tokens") or _decoder_rows(_json(files, "tokenizer_config.json"))
    return _from_vocab(name, vocab, merges, added)


def _from_vocab(name: str, vocab: object, merges: object, added: object) -> _Vocabulary:
    if not isinstance(vocab, Mapping) or not isinstance(merges, list):
        raise MalformedFile(f"{name}: expected a vocabulary and merges")
    ids = list(vocab.values())
    if not all(type(one) is int and 0 <= one < _MAX_TOKENS for one in ids):
        raise MalformedFile(f"{name}: ids in the vocabulary must be below {_MAX_TOKENS}")
    texts = [""] * (max(ids, default=-1) + 1)
    types = [_UNUSED] * len(texts)
    for text, index in vocab.items():
        texts[index], types[index] = text, _NORMAL
    for index, text, special in _added(added, name):
        _place(texts, types, index, text, _CONTROL if special else _USER, name)
    for index, text in enumerate(texts):
        texts[index] = text or f"[PAD{index}]"
    pairs = {"tokenizer.ggml.merges": _strings([_merge(one, name) for one in merges])}
    return _Vocabulary(texts, types, [], pairs)


def _merge(one: object, name: str) -> str:
    """`left right`, with spaces inside either written as byte-level BPE has them."""
    pair = one.split(" ") if isinstance(one, str) else one
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
        raise MalformedFile(f"{name}: a merge is not a pair of tokens: {one!r:.60}")
    return " ".join(part.replace(" ", "\u0120") for part in pair)


def _place(texts: list[str], types: list[int], index: int, text: str, kind: int, name: str) -> None:
    """Put an added token where its id says, filling up what lies between."""
    if index >= _MAX_TOKENS:
        raise MalformedFile(f"{name}: added token {text!r} has id {index}")
    while len(texts) <= index:
        texts.append(f"[PAD{len(texts)}]")
        types.append(_UNUSED)
    texts[index], types[index] = text, kind


def _added(rows: object, name: str) -> Iterator[tuple[int, str, bool]]:
    for row in rows if isinstance(rows, list) else []:
        index = row.get("id") if isinstance(row, Mapping) else None
        text = row.get("content") if isinstance(row, Mapping) else None
        if type(index) is not int or index < 0 or not isinstance(text, str):
            raise MalformedFile(f"{name}: an added token needs an id and a content: {row!r:.60}")
        yield index, text, bool(row.get("special"))


def _decoder_rows(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """tokenizer_config.json's `added_tokens_decoder`, as tokenizer.json would list it."""
    table = config.get("added_tokens_decoder")
    if not isinstance(table, Mapping):
        return []
    return [
        {**row, "id": int(index)}
        for index, row in table.items()
        if isinstance(row, Mapping) and str(index).isdecimal() and len(index) <= _MAX_DIGITS
    ]


def _special(files: Files, texts: list[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of special tokens and flags, as gguf-py's SpecialVocab finds them."""
    given = _json(files, "tokenizer_config.json")
    index = {text: i for i, text in reversed(list(enumerate(texts)))}
    pairs: dict[str, Any] = {}
    for word, key in _SPECIALS.items():
        token = given.get(f"{word}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        number = index.get(text) if isinstance(text, str) else config.get(f"{word}_token_id")
        if type(number) is int and 0 <= number < len(texts):
            pairs[f"tokenizer.ggml.{key}"] = GgufValue("u32", number)
    for word in ("bos", "eos"):
        flag = given.get(f"add_{word}_token")
        if isinstance(flag, bool):
            pairs[f"tokenizer.ggml.add_{word}_token"] = flag
    template = given.get("chat_template")
    if isinstance(template, str):
        pairs["tokenizer.chat_template"] = template
    return pairs


def _steps(node: object) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if not isinstance(node, Mapping):
        return []
    inner = node.get("normalizers") or node.get("pretokenizers")
    if isinstance(inner, list):
        return [step for step in inner if isinstance(step, Mapping)]
    return [node]


def _base64(text: object, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError) as error:
        raise MalformedFile(f"{name}: precompiled_charsmap is not base64: {error}") from None


def _json(files: Files, name: str) -> Mapping[str, Any]:
    if name not in files:
        return {}
    try:
        found = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{name}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise MalformedFile(f"{name}: expected a JSON object")
    return found


def _text(files: Files, name: str) -> str:
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFile(f"{name}: not UTF-8: {error}") from None


def _strings(texts: Iterable[str]) -> GgufArray:
    """Encoded at once: a header is rendered more than once, a vocabulary has 150 000 strings."""
    try:
        raw = [encode_string(text) for text in texts]
    except UnicodeEncodeError as error:
        raise MalformedFile(f"tokenizer: a token is no text: {error}") from None
    return GgufArray("str", len(raw), b"".join(raw))


_READERS: Mapping[str, Callable[[Files], _Vocabulary | None]] = {
    "unigram": _unigram,
    "bpe": _bpe,
    "clip_bpe": _clip_bpe,
}
