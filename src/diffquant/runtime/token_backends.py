"""The three algorithms of text encoders' tokenizers, built with the `tokenizers` library.

=========  ==============================  ====================================================
CLIP       byte-level BPE, `</w>` ends     lower case, white space is one space
Qwen       byte-level BPE, as GPT-2's      splits words by Qwen's own regular expression
T5         Unigram (SentencePiece)         a table of characters, spaces become "▁"
=========  ==============================  ====================================================

Vocabularies come from hostile files: sizes and types are checked before the library sees them, and
whatever it raises, a panic of its Rust code among them, becomes MalformedFile.
Sources: openai/CLIP clip/simple_tokenizer.py; transformers 5.0 models/clip/tokenization_clip.py,
models/qwen2/tokenization_qwen2.py, models/t5/tokenization_t5.py and convert_slow_tokenizer.py
(SpmConverter: the order of normalizers); google/sentencepiece src/normalizer.cc.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from diffquant.core.errors import MalformedFile

__all__ = ["CLIP_SPECIAL", "MAX_TOKENS", "bpe_clip", "bpe_qwen", "parsed", "unigram"]

CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
MAX_TOKENS = 1 << 20
_MAX_CHARSMAP_NBYTES = 8 << 20
_LARGEST_SCORE = 3.4e38
_CLIP_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "▁"

Merges = Sequence[tuple[str, str]]


def parsed(text: str, where: object) -> tokenizers.Tokenizer:
    """Read a tokenizer.json; cutting and padding that it asks for are switched off.

    Raises:
        MalformedFile: not one.
    """
    with _library(where, "not a tokenizer"):
        backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return backend


def bpe_clip(
    words: Mapping[str, int], merges: Merges, *, unknown: str, where: object
) -> tokenizers.Tokenizer:
    """Build CLIP's tokenizer; its special tokens are marked where the vocabulary has them."""
    backend = _bpe(words, merges, where, unk_token=unknown, end_of_word_suffix="</w>")
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
    backend.add_special_tokens([word for word in CLIP_SPECIAL if word in words])
    return backend


def bpe_qwen(
    words: Mapping[str, int], merges: Merges, *, special: Mapping[str, bool], where: object
) -> tokenizers.Tokenizer:
    """Build Qwen's tokenizer.

    Args:
        words: token -> id.
        merges: pairs in order.
        special: added token -> whether it is special; all of them are cut out of texts first.
        where: what messages name.
    """
    backend = _bpe(words, merges, where)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=one) for text, one in special.items()])
    return backend


def unigram(
    pieces: Sequence[tuple[str, float]],
    *,
    unknown: int | None,
    charsmap: bytes = b"",
    add_prefix: bool = True,
    collapse_spaces: bool = True,
    special: Sequence[str] = (),
    where: object,
) -> tokenizers.Tokenizer:
    """Build a SentencePiece Unigram tokenizer.

    Args:
        pieces: (text, log probability) by id.
        unknown: id of what no piece covers.
        charsmap: table of characters, as SentencePiece compiles it.
        add_prefix: whether a text begins with a space.
        collapse_spaces: whether runs of spaces are one, and those at the end none.
        special: texts that are cut out first and are one token each.
        where: what messages name.

    Raises:
        MalformedFile: no usable vocabulary.
    """
    _check_size(len(pieces), where)
    if not all(math.isfinite(score) and abs(score) < _LARGEST_SCORE for _, score in pieces):
        raise MalformedFile("a score in the vocabulary is not a finite float32", path=where)
    if unknown is not None and not 0 <= unknown < len(pieces):
        raise MalformedFile(
            f"the unknown token has id {unknown}, the vocabulary {len(pieces)} tokens", path=where
        )
    if len(charsmap) > _MAX_CHARSMAP_NBYTES:
        raise MalformedFile(f"a character map of {len(charsmap)} bytes", path=where)
    steps: list[normalizers.Normalizer] = []
    with _library(where, "not a Unigram vocabulary"):
        backend = tokenizers.Tokenizer(
            models.Unigram(list(pieces), unk_id=unknown, byte_fallback=False)
        )
        if charsmap:
            steps.append(normalizers.Precompiled(charsmap))
        if collapse_spaces:
            steps += [
                normalizers.Strip(left=False, right=True),
                normalizers.Replace(Regex(" {2,}"), _SPACE),
            ]
        if steps:
            backend.normalizer = normalizers.Sequence(steps)
        scheme = "first" if add_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme=scheme)
        backend.add_special_tokens([AddedToken(text, special=True) for text in special])
        backend.encode("a", add_special_tokens=False)  # a broken character map shows here
    return backend


def _bpe(
    words: Mapping[str, int], merges: Merges, where: object, **options: str
) -> tokenizers.Tokenizer:
    """Build a BPE model from checked words and merges.

    Raises:
        MalformedFile: ids that are no numbers, repeat, or leave most of their range open.
    """
    _check_size(len(words), where)
    ids = list(words.values())
    if not all(type(one) is int and 0 <= one < MAX_TOKENS for one in ids):
        raise MalformedFile(f"a token's id is no number below {MAX_TOKENS}", path=where)
    if len(set(ids)) != len(ids):
        raise MalformedFile("two tokens have one id", path=where)
    with _library(where, "not a BPE vocabulary"):
        return tokenizers.Tokenizer(models.BPE(dict(words), list(merges), **options))


def _check_size(count: int, where: object) -> None:
    if not 0 < count <= MAX_TOKENS:
        raise MalformedFile(f"{count} tokens, expected 1 to {MAX_TOKENS}", path=where)


@contextlib.contextmanager
def _library(where: object, what: str) -> Iterator[None]:
    """Turn whatever the library raises into MalformedFile.

    It raises bare Exception, whatever is wrong, and PanicException, which is no Exception at all.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise MalformedFile(f"{what}: {error}", path=where) from error
