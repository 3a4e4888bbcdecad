"""A tokenizer from the header of a GGUF text encoder: `tokenizer.ggml.*`.

======================  ======================================================================
model "t5"              Unigram: tokens, scores, token_type, precompiled_charsmap
model "gpt2"            byte-level BPE, where `pre` is "qwen2": tokens, token_type, merges
no model, `</w>` there  CLIP's BPE, as clip.cpp and diffquant write it
======================  ======================================================================

Source: ggml-org/llama.cpp src/llama-vocab.cpp (keys, defaults, types of tokens); gguf-py 0.19.0
gguf/constants.py (Keys.Tokenizer, TokenType).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffquant.core.errors import MalformedFile
from diffquant.io.gguf_values import GgufArray
from diffquant.runtime.token_backends import (
    CLIP_SPECIAL,
    MAX_TOKENS,
    bpe_clip,
    bpe_qwen,
    unigram,
)
from diffquant.runtime.tokenizers import Tokenizer

__all__ = ["tokenizer_from_gguf"]

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER = 2, 3, 4
_LENGTHS = {"clip": 77, "t5": 512, "gpt2": 512}  # what callers override for T5 and Qwen


def tokenizer_from_gguf(metadata: Mapping[str, Any], where: object) -> Tokenizer | None:
    """Make a tokenizer from a header's pairs; None where they hold none.

    Raises:
        MalformedFile: pairs that contradict each other, or a kind of tokenizer that is not read.
    """
    if f"{_KEY}tokens" not in metadata:
        return None
    texts = _array(metadata, "tokens", "str", where)
    count = len(texts)
    types = _array(metadata, "token_type", "i32", where, count=count) or (1,) * count
    model = metadata.get(f"{_KEY}model", "clip")
    marked = {
        text: kind == _CONTROL
        for text, kind in zip(texts, types, strict=True)
        if kind in (_CONTROL, _USER, _UNKNOWN)
    }
    if model == "t5":
        backend = _t5(metadata, texts, types, list(marked), where)
    elif model == "gpt2" and metadata.get(f"{_KEY}pre") == "qwen2":
        backend = bpe_qwen(
            _numbered(texts, where), _merges(metadata, where), special=marked, where=where
        )
    elif model == "clip" and any(text.endswith("</w>") for text in texts):
        words = _numbered(texts, where)
        backend = bpe_clip(words, _merges(metadata, where), unknown=CLIP_SPECIAL[1], where=where)
    else:
        pre = metadata.get(f"{_KEY}pre", "")
        raise MalformedFile(
            f"its tokenizer is {model!r:.40} {pre!r:.40}: t5, qwen2 and CLIP's are read; give the "
            "tokenizer's folder with --tokenizer",
            path=where,
        )
    prefix, suffix = _around(metadata, str(model), texts, where)
    pad = _number(metadata, "padding_token_id", count, where)
    if pad is None:
        pad = suffix[-1] if suffix else 0
    return Tokenizer(backend, prefix, suffix, pad, _LENGTHS[str(model)])


def _t5(
    metadata: Mapping[str, Any],
    texts: tuple[str, ...],
    types: tuple[int, ...],
    marked: list[str],
    where: object,
) -> Any:  # noqa: ANN401 - tokenizers.Tokenizer
    scores = _array(metadata, "scores", "f32", where, count=len(texts))
    if scores is None:
        raise MalformedFile(f"a Unigram tokenizer without {_KEY}scores", path=where)
    charsmap = metadata.get(f"{_KEY}precompiled_charsmap")
    if charsmap is not None and not (isinstance(charsmap, GgufArray) and charsmap.type == "u8"):
        raise MalformedFile(f"{_KEY}precompiled_charsmap: expected an array of u8", path=where)
    return unigram(
        list(zip(texts, scores, strict=True)),
        unknown=types.index(_UNKNOWN) if _UNKNOWN in types else None,
        charsmap=bytes(charsmap.raw) if charsmap is not None else b"",
        add_prefix=bool(metadata.get(f"{_KEY}add_space_prefix", True)),
        collapse_spaces=bool(metadata.get(f"{_KEY}remove_extra_whitespaces", False)),
        special=marked,
        where=where,
    )


def _around(
    metadata: Mapping[str, Any], model: str, texts: tuple[str, ...], where: object
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a text: CLIP's two, else what the flags ask for."""
    if model == "clip":
        index = {text: i for i, text in enumerate(texts)}
        if any(one not in index for one in CLIP_SPECIAL):
            raise MalformedFile(f"no {' and '.join(CLIP_SPECIAL)} among its tokens", path=where)
        return (index[CLIP_SPECIAL[0]],), (index[CLIP_SPECIAL[1]],)
    found: list[tuple[int, ...]] = []
    for word, default in (("bos", False), ("eos", model == "t5")):
        number = _number(metadata, f"{word}_token_id", len(texts), where)
        asked = metadata.get(f"{_KEY}add_{word}_token", default)
        if asked and number is None:
            raise MalformedFile(
                f"{_KEY}add_{word}_token is set, {word}_token_id missing", path=where
            )
        found.append((number,) if asked and number is not None else ())
    return found[0], found[1]


def _array(
    metadata: Mapping[str, Any], name: str, kind: str, where: object, *, count: int | None = None
) -> Any:  # noqa: ANN401 - a tuple of `kind`, None where absent
    value = metadata.get(_KEY + name)
    if value is None:
        return None
    if not isinstance(value, GgufArray) or value.type != kind or not 0 < len(value) <= MAX_TOKENS:
        raise MalformedFile(
            f"{_KEY}{name}: expected an array of {kind}, 1 to {MAX_TOKENS} long", path=where
        )
    if count is not None and len(value) != count:
        raise MalformedFile(f"{_KEY}{name}: {len(value)} items for {count} tokens", path=where)
    return tuple(value)


def _numbered(texts: tuple[str, ...], where: object) -> dict[str, int]:
    words = {text: i for i, text in enumerate(texts)}
    if len(words) != len(texts):
        raise MalformedFile(f"{_KEY}tokens: a token comes twice", path=where)
    return words


def _merges(metadata: Mapping[str, Any], where: object) -> list[tuple[str, str]]:
    pairs = []
    for text in _array(metadata, "merges", "str", where) or ():
        pair = text.split(" ")
        if len(pair) != 2:
            raise MalformedFile(f"{_KEY}merges: {text!r:.60} is no pair of tokens", path=where)
        pairs.append((pair[0], pair[1]))
    return pairs


def _number(metadata: Mapping[str, Any], name: str, count: int, where: object) -> int | None:
    value = metadata.get(_KEY + name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < count:
        raise MalformedFile(f"{_KEY}{name} is {value!r:.40}, with {count} tokens", path=where)
    return value
