"""Prompts through CLIP text encoders: which states a model reads, weighted and in chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.families.base import TextOptions, cut_off, device_of
from diffquant.runtime.models.clip import ClipOutput, ClipText
from diffquant.runtime.prompts import Line, chunked, weigh
from diffquant.runtime.tokenizers import Tokenizer

__all__ = ["ClipStates", "encode_clip"]

_MOST_REPEATED = 4


@dataclass(frozen=True, slots=True)
class ClipStates:
    """What an encoder made of prompts.

    Attributes:
        states: (B, 77 n, width), of the layer asked for; n chunks.
        pooled: (B, projection) where the encoder projects, else (B, width); of the first chunk.
        truncated: what did not fit.
    """

    states: Tensor
    pooled: Tensor
    truncated: tuple[str, ...]


def encode_clip(
    encoder: ClipText,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: TextOptions,
    *,
    skip: int = 1,
    normed: bool = True,
) -> ClipStates:
    """Encode prompts over CLIP's 77 positions, or several times that.

    Args:
        encoder: any of the CLIP text encoders.
        tokenizer: its tokenizer.
        prompts: B texts.
        options: `clip_skip` overrides `skip`, `style` says how weights act.
        skip: the layer read by default, counted from the end: 1 is the last.
        normed: whether the final norm is applied to it (SD1.5 and SD2 yes, SDXL no).

    Raises:
        UsageError: more layers skipped than there are, or prompts of very different lengths.
    """
    # equal prompts, as in a batch of one prompt, are read once
    each = {prompt: chunked(tokenizer, prompt, options.style) for prompt in dict.fromkeys(prompts)}
    lines = [line for chunks in each.values() for line in chunks]
    weighted = any(weight != 1 for line in lines for weight in line.weights)
    empty = chunked(tokenizer, "", options.style) if weighted else ()
    out = _run(encoder, [*lines, *empty])
    states = _layer(encoder, out, skip if options.clip_skip is None else options.clip_skip, normed)
    if weighted:
        weights = torch.tensor([line.weights for line in lines])
        states = weigh(states[: len(lines)], weights, states[-1], options.style)
    pooled = out.pooled if out.projected is None else out.projected
    counts = [len(chunks) for chunks in each.values()]
    begins = itertools.accumulate(counts, initial=0)
    first = dict(zip(each, begins, strict=False))  # the last sum begins nothing
    together = _common(counts)
    rows = []
    for prompt in prompts:
        count = len(each[prompt])
        own = states[first[prompt] : first[prompt] + count].flatten(0, 1)  # (77 count, width)
        # keys and values seen several times over change nothing in an attention
        rows.append(own.repeat(together // count, 1))
    cut = cut_off("clip", [line.truncated for line in lines])
    return ClipStates(torch.stack(rows), pooled[[first[prompt] for prompt in prompts]], cut)


def _run(encoder: ClipText, lines: Sequence[Line]) -> ClipOutput:
    ids = torch.tensor([line.ids for line in lines], dtype=torch.int64)
    out: ClipOutput = encoder(ids.to(device_of(encoder)))
    return out


def _layer(encoder: ClipText, out: ClipOutput, skip: int, normed: bool) -> Tensor:
    if not 1 <= skip < len(out.hidden):
        raise UsageError(f"clip skip must be 1 to {len(out.hidden) - 1}, found {skip}")
    if not normed:
        return out.hidden[-skip]
    normalized: Tensor = encoder.text_model.final_layer_norm(out.hidden[-skip])
    return out.last if skip == 1 else normalized


def _common(counts: Sequence[int]) -> int:
    """Chunks that all prompts of a batch can be repeated to."""
    together = math.lcm(*counts)
    if together > _MOST_REPEATED * max(counts):
        listed = ", ".join(map(str, counts))
        raise UsageError(
            f"the prompts of this batch take {listed} chunks of 75 tokens: run them one by one"
        )
    return together
