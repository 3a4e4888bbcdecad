"""Prompts through encoders of lines as long as one likes (T5): weighted, cut at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffquant.runtime.families.base import TextOptions, device_of
from diffquant.runtime.prompts import line, weigh
from diffquant.runtime.tokenizers import Tokenizer

__all__ = ["LineStates", "encode_lines"]


@dataclass(frozen=True, slots=True)
class LineStates:
    """What an encoder made of prompts.

    Attributes:
        states: (B, length, width).
        truncated: per prompt, what did not fit, "" if all of it did.
    """

    states: Tensor
    truncated: tuple[str, ...]


def encode_lines(
    encoder: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: TextOptions,
    *,
    length: int,
) -> LineStates:
    """Encode prompts with an encoder that turns ids (B, length) into states, padding seen.

    Args:
        encoder: ids -> (B, length, width).
        tokenizer: its tokenizer.
        prompts: B texts.
        options: `style` says how weights act.
        length: tokens, those of the padding included.
    """
    lines = [line(tokenizer, prompt, options.style, length) for prompt in prompts]
    weights = torch.tensor([one.weights for one in lines])
    weighted = bool((weights != 1).any())
    read = [*lines, line(tokenizer, "", options.style, length)] if weighted else lines
    ids = torch.tensor([one.ids for one in read], dtype=torch.int64)
    states: Tensor = encoder(ids.to(device_of(encoder)))
    if weighted:
        states = weigh(states[: len(lines)], weights, states[-1], options.style)
    return LineStates(states, tuple(one.truncated for one in lines))
