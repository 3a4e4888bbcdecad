"""What differs between families of models when a picture is made, as one row each.

A family says which parts it needs, how text is encoded, and how the denoiser is called; the loop
around it, guidance included, is in pipeline.py. Latents between the rows and the loop are always
(B, C, h, w), whatever the denoiser makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diffquant.core.errors import UsageError
from diffquant.runtime.guidance import guided
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.schedules import SchedulerFacts
from diffquant.runtime.tokenizers import Tokenizer

__all__ = [
    "Beside",
    "Call",
    "Conditions",
    "Family",
    "PipelineParts",
    "Text",
    "TextOptions",
    "beside_latents",
    "cut_off",
    "device_of",
    "no_clip_skip",
    "no_guidance",
]


@dataclass(frozen=True, slots=True)
class PipelineParts:
    """A pipeline in memory.

    Attributes:
        architecture: slug, a key of FAMILIES.
        denoiser, vae, text_encoders: modules as `build` makes them; text encoders in the order of
            the family's `needs`.
        tokenizers: one per text encoder, in the same order.
        scheduler: what the checkpoint says about its schedule.
        zeros_for_empty: whether no negative prompt means zeros (SDXL base), where a family knows
            the difference.
        distilled: whether the checkpoint says that it was made to run without guidance.
    """

    architecture: str
    denoiser: nn.Module
    vae: Autoencoder
    text_encoders: tuple[nn.Module, ...]
    tokenizers: tuple[Tokenizer, ...]
    scheduler: SchedulerFacts
    zeros_for_empty: bool = True
    distilled: bool = False


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How prompts are encoded, besides what they say.

    Attributes:
        tokens: length for encoders that have no fixed one (T5, Qwen), None: the family's.
        clip_skip: layers of CLIP left out at the end, as A1111 counts: 1 none, 2 the last one;
            None: the family's own.
        negative: whether these are what to stay away from.
        style: how weights in prompts act, as prompts.py names it; a family that reads none takes
            the prompt as it is written.
    """

    tokens: int | None = None
    clip_skip: int | None = None
    negative: bool = False
    style: str = "comfy"


@dataclass(frozen=True, slots=True)
class Text:
    """Encoded prompts.

    Attributes:
        states: (B, T, width).
        pooled: (B, width), where the family uses one.
        truncated: what the tokenizers cut off, "clip: ..." or "t5: ...".
        mask: (B, T) bool, True where a token counts; None: all do.
        negative: as in TextOptions.
    """

    states: Tensor
    pooled: Tensor | None
    truncated: tuple[str, ...] = ()
    mask: Tensor | None = None
    negative: bool = False


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a run is conditioned on, besides its texts.

    Attributes:
        size: (width, height) in pixels.
        guidance: distilled strength, for models that take one; None: the model's default.
        beside: (B, C', h, w) channels shown beside the latents (inpainting, Fill), else None.
    """

    size: tuple[int, int]
    guidance: float | None = None
    beside: Tensor | None = None


# (mask (B, 1, H, W) of 0 and 1, latents (B, C, h, w) of the picture without what is painted anew)
# -> (B, C', h, w) for Conditions.beside.
Beside: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# (latents (B, C, h, w), timestep, texts of B prompts each) -> one prediction per text, float32,
# like the latents.
Call: TypeAlias = Callable[[Tensor, float, Sequence[Text]], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        needs: part names a picture takes: denoiser, vae, text encoders in the order `encode` wants.
        patch: latent pixels per token along a side; sizes must be a multiple of it times the VAE's
            factor.
        flow: whether the denoiser predicts a flow's velocity.
        cfg: default strength of classifier-free guidance.
        encode: (parts, prompts, options) -> Text.
        caller: (parts, conditions) -> Call.
        nothing: (parts, positive) -> what stands for no negative prompt; None: the text "", or no
            guidance for flows.
        beside: parts -> what an inpainting denoiser is shown beside the latents, None where this
            denoiser is shown nothing; None: no denoiser of the family is.
        guide: (positive, negative, cfg) -> the guided prediction, all of them like the latents.
        schedule: (scheduler, tokens of the picture, steps) -> what the run's schedule is made of;
            None: the checkpoint's own.
    """

    needs: tuple[str, ...]
    patch: int
    flow: bool
    cfg: float
    encode: Callable[[PipelineParts, Sequence[str], TextOptions], Text]
    caller: Callable[[PipelineParts, Conditions], Call]
    nothing: Callable[[PipelineParts, Text], Text | None] | None = None
    beside: Callable[[PipelineParts], Beside | None] | None = None
    guide: Callable[[Tensor, Tensor, float], Tensor] = guided
    schedule: Callable[[SchedulerFacts, int, int], SchedulerFacts] | None = None


def device_of(module: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(module.parameters()).device


def cut_off(label: str, truncated: Sequence[str]) -> tuple[str, ...]:
    """Label what a tokenizer cut off; prompts that fit are left out."""
    return tuple(f"{label}: {text}" for text in truncated if text)


def no_clip_skip(options: TextOptions) -> None:
    """Refuse a choice of CLIP's layer for a model that reads none of them.

    Raises:
        UsageError: it was given.
    """
    if options.clip_skip is not None:
        raise UsageError("this model reads no layer of CLIP, so clip skip has no effect on it")


def no_guidance(conditions: Conditions) -> None:
    """Refuse distilled guidance for a model that takes none.

    Raises:
        UsageError: it was given.
    """
    if conditions.guidance is not None:
        raise UsageError("this model takes no distilled guidance; use cfg")


def beside_latents(conditions: Conditions, channels: int, latents: int, what: str) -> Tensor | None:
    """What is shown beside the latents, checked against the channels the denoiser takes.

    Args:
        conditions: of the run.
        channels: per latent pixel, that the denoiser takes.
        latents: channels of the latents.
        what: the denoiser's kind, for the message.

    Raises:
        UsageError: the denoiser wants other channels than there are.
    """
    beside = conditions.beside
    given = latents + (0 if beside is None else beside.shape[1])
    if channels == given:
        return beside
    if beside is None:
        raise UsageError(
            f"this {what} takes {channels} channels, not the {latents} of text to image: "
            "an inpainting or editing model; give it a picture and a mask"
        )
    raise UsageError(f"this {what} takes {channels} channels, found {given} with picture and mask")
