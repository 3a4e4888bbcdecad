"""Prompts to token ids, exactly as the pipelines' tokenizers do it.

The `tokenizers` library does the work. A folder is read from its tokenizer.json, or from vocab.json
and merges.txt (CLIP only). Cutting and padding are done here, in sight: what did not fit comes back
as text, so that a caller can say so.
Source of CLIP's recipe: openai/CLIP clip/simple_tokenizer.py; huggingface/transformers
models/clip/tokenization_clip.py for the regular expression and the order of normalizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from diffquant.core.errors import MalformedFile

__all__ = ["Tokenizer", "Tokens", "load_tokenizer"]

_CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_CLIP_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


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
    """Load the tokenizer in `folder`.

    Raises:
        MalformedFile: neither a tokenizer.json nor vocab.json with merges.txt, or unusable ones.
    """
    settings = _settings(folder)
    fast = folder / "tokenizer.json"
    slow = folder / "vocab.json", folder / "merges.txt"
    if fast.is_file():
        backend = _parsed(fast)
    elif all(path.is_file() for path in slow):
        backend = _clip(*slow, unknown=settings.get("unk_token", _CLIP_SPECIAL[1]))
    else:
        raise MalformedFile(
            "no tokenizer: expected tokenizer.json, or vocab.json and merges.txt", path=folder
        )
    _mark_special(backend, settings)
    # CLIP: start, end; T5: end; Qwen: nothing.
    around = backend.encode("", add_special_tokens=True).ids
    if not around and not fast.is_file():
        named = (settings.get("bos_token"), settings.get("eos_token"))
        pairs = zip(named, _CLIP_SPECIAL, strict=True)
        around = [_id(backend, name or default, folder) for name, default in pairs]
    pad = settings.get("pad_token")
    return Tokenizer(
        backend=backend,
        prefix=tuple(around[:-1]),
        suffix=tuple(around[-1:]),
        pad=_id(backend, pad, folder) if pad is not None else around[-1] if around else 0,
        length=_length(settings),
    )


def _parsed(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception, whatever is wrong with the file
        raise MalformedFile(f"not a tokenizer: {error}", path=path) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _clip(vocabulary: Path, merges: Path, *, unknown: str) -> tokenizers.Tokenizer:
    """Build CLIP's byte-level BPE: lower case, white space is one space, words end in `</w>`."""
    try:
        words = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        kept = (line.split() for line in lines if line and not line.startswith("#version"))
        pairs = [(first, second) for first, second in kept]
        model = models.BPE(
            words, pairs, unk_token=unknown, end_of_word_suffix="</w>", fuse_unk=False
        )
    except Exception as error:  # json errors, and the library's bare Exception
        raise MalformedFile(f"not a CLIP vocabulary: {error}", path=vocabulary.parent) from error
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([word for word in _CLIP_SPECIAL if word in words])
    return backend


def _mark_special(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Cut the special tokens out of prompts before anything else, as transformers does.

    With a padding token of "!" (SD2, OpenCLIP), each "!" of a prompt then is a token of its own.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    named = (text for key, text in settings.items() if key.endswith("_token"))
    fresh = {text for text in named if isinstance(text, str) and text not in known}
    present = sorted(text for text in fresh if backend.token_to_id(text) is not None)
    backend.add_special_tokens([AddedToken(text, special=True) for text in present])


def _settings(folder: Path) -> Mapping[str, Any]:
    """Special tokens and lengths of a folder.

    Files saved before tokenizer_config.json listed `added_tokens_decoder` say their tokens in
    special_tokens_map.json, which then wins (SD2 pads with "!"): transformers
    tokenization_utils_base.py.
    """
    merged: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file() or "added_tokens_decoder" in merged:
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MalformedFile(f"not JSON: {error}", path=path) from error
        for key, value in found.items():
            text = (
                value.get("content")
                if key.endswith("_token") and isinstance(value, dict)
                else value
            )
            if text is not None:
                merged[key] = text
    return merged


def _length(settings: Mapping[str, Any]) -> int:
    """The model's maximal length; absent or absurd (transformers writes 1e30 for "unknown"): 77."""
    length = settings.get("model_max_length")
    return int(length) if isinstance(length, int | float) and 0 < length < 2**20 else 77


def _id(backend: tokenizers.Tokenizer, token: str, folder: Path) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise MalformedFile(f"special token {token!r} is not in the vocabulary", path=folder)
    return int(found)
