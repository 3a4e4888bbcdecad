"""Prompts through Qwen3 as the only turn of a chat: which states a model reads of it.

The template is the one in Qwen3's tokenizer_config.json (`chat_template`), for one message of the
user and what asks for an answer. An answer without thinking begins with an empty thought.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.families.base import PipelineParts, TextOptions, cut_off, device_of
from diffquant.runtime.models.qwen_text import QwenText

__all__ = ["NO_THOUGHT", "ChatStates", "encode_chat"]

_BEFORE, _AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
_LENGTH = 512  # max_sequence_length of the pipelines that use this


@dataclass(frozen=True, slots=True)
class ChatStates:
    """What the encoder made of prompts.

    Attributes:
        states: (B, T, width) of each layer asked for, tokens before padding.
        mask: (B, T) bool, False at padding.
        truncated: what did not fit.
    """

    states: tuple[Tensor, ...]
    mask: Tensor
    truncated: tuple[str, ...]


def encode_chat(
    parts: PipelineParts,
    prompts: Sequence[str],
    options: TextOptions,
    *,
    layers: Sequence[int],
    answer: str = "",
    padded: bool = False,
) -> ChatStates:
    """Encode prompts, template included, cut at the end.

    Args:
        parts: the one text encoder is a QwenText.
        prompts: B texts.
        options: `tokens` is the most there may be, default 512.
        layers: states to read, as QwenText counts them.
        answer: what the answer begins with.
        padded: whether to fill up to that length; else to the longest prompt.

    Raises:
        UsageError: fewer tokens than one.
    """
    encoder, tokenizer = parts.text_encoders[0], parts.tokenizers[0]
    assert isinstance(encoder, QwenText)
    length = _LENGTH if options.tokens is None else options.tokens
    if length < 1:
        raise UsageError(f"text tokens must be at least 1, found {length}")

    def ids_of(text: str) -> list[int]:
        found: list[int] = tokenizer.backend.encode(text, add_special_tokens=False).ids
        return found

    closing = len(ids_of(_AFTER + answer))
    rows, rests = [], []
    for prompt in prompts:
        ids = ids_of(_BEFORE + prompt + _AFTER + answer)
        rows.append(ids[:length])
        rest = tokenizer.backend.decode(ids[length:-closing], skip_special_tokens=False)
        rests.append(rest.strip())
    width = length if padded else max(map(len, rows))
    device = device_of(encoder)
    filled = [row + [tokenizer.pad] * (width - len(row)) for row in rows]
    counts = torch.tensor([[n < len(row) for n in range(width)] for row in rows], device=device)
    states = encoder(torch.tensor(filled, device=device), counts, layers)
    return ChatStates(states, counts, cut_off("qwen3", rests))
