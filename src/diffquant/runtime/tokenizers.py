"""Prompts to token ids, exactly as the pipelines' tokenizers do it.

The `tokenizers` library does the work. A folder is read from its tokenizer.json, from vocab.json
and merges.txt (CLIP, Qwen), or from spiece.model (T5); what a GGUF header has is read by
tokenizer_gguf.py. Cutting and padding are done here, in sight: what did not fit comes back as text,
so that a caller can say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken
from torch import Tensor

from diffquant.convert.encoders.spiece import read_spiece
from diffquant.core.errors import MalformedFile
from diffquant.runtime.token_backends import (
    CLIP_SPECIAL,
    MAX_TOKENS,
    bpe_clip,
    bpe_qwen,
    parsed,
    unigram,
)

__all__ = ["TOKENIZER_FILES", "Tokenizer", "Tokens", "load_tokenizer", "tokenizer_from_files"]

# What a tokenizer's folder can hold; nothing else in it is read.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_MAX_FILE_NBYTES = 64 << 20
_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # types of SentencePiece's pieces
_SENTINELS = 100  # T5's <extra_id_99> to <extra_id_0>, after the pieces
_MAX_SENTINELS = 10_000


@dataclass(frozen=True, slots=True)
class Tokens:
    """Encoded prompts.

    Attributes:
        ids: (B, length) int64, cut and padded.
        truncated: per prompt, the end that did not fit, "" if all of it did.
    """

    ids: Tensor
    truncated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A tokenizer with what surrounds a prompt.

    Attributes:
        backend: encodes the bare text.
        prefix, suffix: ids before and after a prompt.
        pad: id that fills the rest.
        length: default number of ids, those of prefix, suffix and padding included.
    """

    backend: tokenizers.Tokenizer
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int
    length: int

    def encode(self, texts: Sequence[str], *, length: int | None = None) -> Tokens:
        """Encode, cut at the end to `length` ids, close with the suffix, pad."""
        length = length or self.length
        room = length - len(self.prefix) - len(self.suffix)
        rows, truncated = [], []
        for text in texts:
            encoding = self.backend.encode(text, add_special_tokens=False)
            ids = [*self.prefix, *encoding.ids[:room], *self.suffix]
            rows.append(ids + [self.pad] * (length - len(ids)))
            truncated.append(self._rest(encoding.ids[room:]))
        return Tokens(torch.tensor(rows, dtype=torch.int64), tuple(truncated))

    def _rest(self, ids: Sequence[int]) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=False) if ids else ""
        return text.replace("</w>", " ").strip()


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer in `folder`, of this machine or of a repository.

    Raises:
        MalformedFile: no tokenizer in it, or an unusable one.
    """
    found = {}
    for name in TOKENIZER_FILES:
        path = folder / name
        if not path.is_file():
            continue
        nbytes = path.stat().st_size
        if nbytes > _MAX_FILE_NBYTES:
            raise MalformedFile(
                f"{nbytes} bytes, at most {_MAX_FILE_NBYTES} expected of a tokenizer", path=path
            )
        found[name] = path.read_bytes()
    return tokenizer_from_files(found, folder)


def tokenizer_from_files(files: Mapping[str, bytes], where: object) -> Tokenizer:
    """Make a tokenizer from a folder's files.

    Args:
        files: name (one of TOKENIZER_FILES) -> content.
        where: what messages name.

    Raises:
        MalformedFile: they are no tokenizer.
    """
    settings = _settings(files, where)
    for names, make in _READERS:
        if all(name in files for name in names):
            backend = make(files, settings, where)
            break
    else:
        raise MalformedFile(
            "no tokenizer: expected tokenizer.json, vocab.json and merges.txt, or spiece.model",
            path=where,
        )
    _mark_special(backend, settings)
    prefix, suffix = _around(backend, settings, where)
    return Tokenizer(
        backend, prefix, suffix, _padding(backend, settings, suffix, where), _length(settings)
    )


def _from_json(
    files: Mapping[str, bytes], settings: Mapping[str, Any], where: object
) -> tokenizers.Tokenizer:
    del settings
    return parsed(_text(files, "tokenizer.json", where), where)


def _from_words(
    files: Mapping[str, bytes], settings: Mapping[str, Any], where: object
) -> tokenizers.Tokenizer:
    """Tell CLIP's vocabulary from Qwen's by its marks at ends of words."""
    words = _json(files, "vocab.json", where)
    lines = _text(files, "merges.txt", where).split("\n")
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2:
            raise MalformedFile(f"merges.txt, line {number}: expected two tokens", path=where)
        pairs.append((pair[0], pair[1]))
    if any(word.endswith("</w>") for word in words):
        unknown = settings.get("unk_token", CLIP_SPECIAL[1])
        return bpe_clip(words, pairs, unknown=unknown, where=where)
    return bpe_qwen(words, pairs, special=_added(words, settings, where), where=where)


def _added(words: dict[str, Any], settings: Mapping[str, Any], where: object) -> Mapping[str, bool]:
    """Added tokens of tokenizer_config.json -> whether they are special; their ids join `words`."""
    table = settings.get("added_tokens_decoder") or {}
    if not isinstance(table, dict) or len(table) > MAX_TOKENS:
        raise MalformedFile("tokenizer_config.json: added_tokens_decoder is no table", path=where)
    special = {}
    for number, row in table.items():
        text = row.get("content") if isinstance(row, dict) else None
        if not isinstance(text, str) or not (number.isdecimal() and len(number) < 10):
            raise MalformedFile(
                "tokenizer_config.json: an added token needs an id and a content", path=where
            )
        if words.setdefault(text, int(number)) != int(number):
            raise MalformedFile(
                f"token {text!r} has id {words[text]} in vocab.json and {number} in "
                "tokenizer_config.json",
                path=where,
            )
        special[text] = bool(row.get("special"))
    return special


def _from_spiece(
    files: Mapping[str, bytes], settings: Mapping[str, Any], where: object
) -> tokenizers.Tokenizer:
    name = "spiece.model" if "spiece.model" in files else "tokenizer.model"
    model = read_spiece(files[name], f"{where}/{name}")
    if not model.is_unigram:
        raise MalformedFile(
            f"{name}: its pieces are merged (BPE), only Unigram is read", path=where
        )
    pieces = list(zip(model.texts, model.scores, strict=True))
    marked = [t for t, kind in zip(model.texts, model.types, strict=True) if kind in _MARKED]
    count = settings.get("extra_ids", _SENTINELS)
    if type(count) is not int or not 0 <= count <= _MAX_SENTINELS:
        raise MalformedFile(f"tokenizer_config.json: extra_ids is {count!r:.40}", path=where)
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(count))]
    return unigram(
        [*pieces, *((text, 0.0) for text in sentinels)],
        unknown=model.types.index(_UNKNOWN) if _UNKNOWN in model.types else None,
        charsmap=model.charsmap,
        add_prefix=model.add_prefix,
        collapse_spaces=model.collapse_spaces,
        special=[*marked, *sentinels],
        where=where,
    )


_MARKED = (_UNKNOWN, _CONTROL, _USER)
_Reader = Callable[[Mapping[str, bytes], Mapping[str, Any], object], tokenizers.Tokenizer]
_READERS: tuple[tuple[tuple[str, ...], _Reader], ...] = (
    (("tokenizer.json",), _from_json),
    (("vocab.json", "merges.txt"), _from_words),
    (("spiece.model",), _from_spiece),
    (("tokenizer.model",), _from_spiece),
)


def _mark_special(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Cut the special tokens out of prompts before anything else, as transformers does.

    With a padding token of "!" (SD2, OpenCLIP), each "!" of a prompt then is a token of its own.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = (text for key, text in settings.items() if key.endswith("_token"))
    fresh = {text for text in named if isinstance(text, str) and text not in known}
    present = sorted(text for text in fresh if backend.token_to_id(text) is not None)
    backend.add_special_tokens([AddedToken(text, special=True) for text in present])


def _around(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], where: object
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after a prompt: CLIP has a start and an end, T5 an end, Qwen none."""
    ids = backend.encode("", add_special_tokens=True).ids  # where tokenizer.json says it
    if ids:
        return tuple(ids[:-1]), tuple(ids[-1:])
    if backend.token_to_id(CLIP_SPECIAL[0]) is not None:
        named = (settings.get("bos_token"), settings.get("eos_token"))
        pairs = zip(named, CLIP_SPECIAL, strict=True)
        start, end = (_id(backend, name or default, where) for name, default in pairs)
        return (start,), (end,)
    if isinstance(backend.model, tokenizers.models.Unigram):
        return (), (_id(backend, settings.get("eos_token") or "</s>", where),)
    return (), ()


def _padding(
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    suffix: tuple[int, ...],
    where: object,
) -> int:
    """The named padding token, else SentencePiece's, else what ends a prompt."""
    named = settings.get("pad_token")
    if named is not None:
        return _id(backend, named, where)
    found = backend.token_to_id("<pad>")
    if found is not None:
        return int(found)
    return suffix[-1] if suffix else _id(backend, settings.get("eos_token") or "<pad>", where)


def _settings(files: Mapping[str, bytes], where: object) -> dict[str, Any]:
    """Special tokens and lengths of a folder.

    Files saved before tokenizer_config.json listed `added_tokens_decoder` say their tokens in
    special_tokens_map.json, which then wins (SD2 pads with "!"): transformers
    tokenization_utils_base.py.
    """
    merged: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name not in files or "added_tokens_decoder" in merged:
            continue
        for key, value in _json(files, name, where).items():
            one = value
            if key.endswith("_token") and not isinstance(value, bool):
                one = value.get("content") if isinstance(value, dict) else value
                if one is not None and not isinstance(one, str):
                    raise MalformedFile(f"{name}: {key} is no text", path=where)
            if one is not None:
                merged[key] = one
    return merged


def _json(files: Mapping[str, bytes], name: str, where: object) -> dict[str, Any]:
    try:
        found = json.loads(_text(files, name, where))
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{name}: not JSON: {error}", path=where) from None
    if not isinstance(found, dict):
        raise MalformedFile(f"{name}: expected a JSON object", path=where)
    return found


def _text(files: Mapping[str, bytes], name: str, where: object) -> str:
    try:
        return files[name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedFile(f"{name}: not UTF-8: {error}", path=where) from None


def _length(settings: Mapping[str, Any]) -> int:
    """The model's maximal length; absent or absurd (transformers writes 1e30 for "unknown"): 77."""
    length = settings.get("model_max_length")
    return int(length) if isinstance(length, int | float) and 0 < length < 2**20 else 77


def _id(backend: tokenizers.Tokenizer, token: str, where: object) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise MalformedFile(f"special token {token!r} is not in the vocabulary", path=where)
    return int(found)
