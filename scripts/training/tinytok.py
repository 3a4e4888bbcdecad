"""Build the demo pipelines' tokenizers: real algorithms, a vocabulary of a few hundred tokens.

Each builder writes one tokenizer folder that transformers loads (CLIPTokenizer, T5TokenizerFast,
Qwen2Tokenizer) and whose ``tokenizer.json`` the `tokenizers` library reads alone. Every word of
the demo grammar is one token; all other text falls back to bytes (CLIP, Qwen) or to single
characters (T5), so no prompt is refused.

The vocabularies are made here, from the grammar's words; nothing is taken from a published one.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

__all__ = ["QWEN_SPECIAL", "write_clip", "write_qwen", "write_t5"]

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The fixed text that QwenImagePipeline puts before a prompt and then cuts off by counting 34
# tokens: each of its words has to be one token here too, or the count cuts into the prompt.
# fmt: off
QWEN_TEMPLATE_WORDS = (
    "system", "Describe", "user", "assistant", "Ġthe", "Ġimage", "Ġby", "Ġdetailing", "Ġcolor",
    "Ġshape", "Ġsize", "Ġtexture", "Ġquantity", "Ġtext", "Ġspatial", "Ġrelationships", "Ġof",
    "Ġobjects", "Ġand", "Ġbackground",
)
# fmt: on
# huggingface/transformers@v5.0.0:src/transformers/models/{clip,qwen2}/tokenization_*.py
CLIP_SPLIT = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_clip(folder: Path, words: Iterable[str], *, pad: str = EOS) -> int:
    """Write a CLIP tokenizer (byte-level BPE with ``</w>``, at most 77 tokens).

    Args:
        pad: ``<|endoftext|>`` as in SD1.5's, ``!`` (id 0) as in SDXL's second tokenizer.
    Returns:
        The vocabulary's size; the last two ids are start and end of text.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = _learn_merges(spelled)
    letters = _byte_letters()
    pieces = [*letters, *(x + "</w>" for x in letters), *(a + b for a, b in merges), BOS, EOS]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=EOS)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (EOS, vocab[EOS]), (BOS, vocab[BOS]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (BOS, EOS)]
    )
    names = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **names,
    }
    _write(folder, tokenizer, config)
    _write_bpe(folder, vocab, merges)
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1), "utf-8")
    return len(vocab)


def write_t5(folder: Path, words: Iterable[str]) -> int:
    """Write a T5 tokenizer (Unigram); returns the vocabulary's size."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [("▁" + word, -3.0) for word in sorted(set(words))]
    pieces += [(chr(code), -12.0) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    special = ("<pad>", "</s>", "<unk>")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": 512,
        "extra_ids": 0,
        "additional_special_tokens": [],
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    _write(folder, tokenizer, config)
    return len(pieces)


def write_qwen(folder: Path, words: Iterable[str]) -> dict[str, int]:
    """Write a Qwen2 tokenizer (byte-level BPE); returns the ids of QWEN_SPECIAL.

    The vocabulary's size is the highest of these ids plus one.
    """
    plain = sorted(set(words))
    spelled = [*plain, *("Ġ" + word for word in plain), *QWEN_TEMPLATE_WORDS]
    merges = _learn_merges([list(word) for word in dict.fromkeys(spelled)])
    pieces = [*_byte_letters(), *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(t, special=True, normalized=False) for t in QWEN_SPECIAL]
    tokenizer.add_special_tokens(added)
    ids = {token: len(vocab) + i for i, token in enumerate(QWEN_SPECIAL)}
    plain_token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "bos_token": None,
        "unk_token": None,
        "errors": "replace",
        "split_special_tokens": False,
        "add_prefix_space": False,
        "add_bos_token": False,
        "additional_special_tokens": list(QWEN_SPECIAL[1:]),
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True, **plain_token} for token, i in ids.items()
        },
    }
    _write(folder, tokenizer, config)
    _write_bpe(folder, vocab, merges)
    return ids


def _byte_letters() -> list[str]:
    """The 256 printable letters that byte-level BPE writes for bytes, in GPT-2's order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))]


def _learn_merges(words: Sequence[list[str]]) -> list[tuple[str, str]]:
    """Merge the most frequent pair until every word is one token; ties go by spelling."""
    words = [list(word) for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in words:
            at = 0
            while at + 1 < len(word):
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = [best[0] + best[1]]
                at += 1


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")


def _write_bpe(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """The two older files, which published folders have too."""
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
