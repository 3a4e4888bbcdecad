"""Prompts through CLIP text encoders: which states a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.families.base import TextOptions, cut_off, device_of
from diffquant.runtime.models.clip import ClipText
from diffquant.runtime.tokenizers import Tokenizer

__all__ = ["ClipStates", "encode_clip"]


@dataclass(frozen=True, slots=True)
class ClipStates:
    """What an encoder made of prompts.

    Attributes:
        states: (B, 77, width), of the layer asked for.
        pooled: (B, projection) where the encoder projects, else (B, width).
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
    """Encode prompts over CLIP's 77 positions.

    Args:
        encoder: any of the CLIP text encoders.
        tokenizer: its tokenizer.
        prompts: B texts.
        options: `clip_skip` overrides `skip`.
        skip: the layer read by default, counted from the end: 1 is the last.
        normed: whether the final norm is applied to it (SD1.5 and SD2 yes, SDXL no).

    Raises:
        UsageError: more layers skipped than there are.
    """
    tokens = tokenizer.encode(prompts)
    out = encoder(tokens.ids.to(device_of(encoder)))
    skip = options.clip_skip or skip
    if not 1 <= skip < len(out.hidden):
        raise UsageError(f"clip skip must be 1 to {len(out.hidden) - 1}, found {skip}")
    states = out.hidden[-skip]
    if normed:
        states = out.last if skip == 1 else encoder.text_model.final_layer_norm(states)
    pooled = out.pooled if out.projected is None else out.projected
    return ClipStates(states, pooled, cut_off("clip", tokens.truncated))
