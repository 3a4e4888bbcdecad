"""What differs between families of models when a picture is made.

How text is encoded, how the denoiser is called, what sizes it takes; the loop around it is in
pipeline.py. One row per architecture in FAMILIES; latents between the rows and the loop are always
(B, C, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diffquant.core.errors import UsageError
from diffquant.runtime.guidance import guided
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.models.flux import Flux, image_ids, pack, unpack
from diffquant.runtime.models.unet import UNet
from diffquant.runtime.models.vae_kl import AutoencoderKL
from diffquant.runtime.schedules import SchedulerFacts
from diffquant.runtime.tokenizers import Tokenizer

__all__ = ["FAMILIES", "Conditions", "Family", "PipelineParts", "Predict", "Text"]


@dataclass(frozen=True, slots=True)
class PipelineParts:
    """A pipeline in memory.

    Attributes:
        architecture: slug, a key of FAMILIES.
        denoiser, vae, text_encoders: modules as `build` makes them. SD1.5 and SD2: (clip,); Flux:
            (clip, t5).
        tokenizers: one per text encoder, in the same order.
        scheduler: what the checkpoint says about its schedule.
    """

    architecture: str
    denoiser: nn.Module
    vae: AutoencoderKL
    text_encoders: tuple[nn.Module, ...]
    tokenizers: tuple[Tokenizer, ...]
    scheduler: SchedulerFacts


@dataclass(frozen=True, slots=True)
class Text:
    """Encoded prompts: states (B, T, width), pooled (B, width) where used, and what was cut off."""

    states: Tensor
    pooled: Tensor | None
    truncated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a run is conditioned on.

    Attributes:
        positive, negative: text; negative is None without classifier-free guidance.
        cfg: its strength.
        guidance: distilled strength, for models that take one.
    """

    positive: Text
    negative: Text | None
    cfg: float
    guidance: float | None


Predict: TypeAlias = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class Family:
    """One family.

    Attributes:
        patch: latent pixels per token along a side; sizes must be a multiple of it times the VAE's
            factor.
        flow: whether the denoiser predicts a flow's velocity.
        cfg: default strength of classifier-free guidance.
        encode: (parts, prompts, text tokens or None) -> Text.
        predictor: (parts, conditions) -> function of (latents, timestep) giving the prediction.
    """

    patch: int
    flow: bool
    cfg: float
    encode: Callable[[PipelineParts, Sequence[str], int | None], Text]
    predictor: Callable[[PipelineParts, Conditions], Predict]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _cut(label: str, truncated: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{label}: {text}" for text in truncated if text)


def _sd_encode(parts: PipelineParts, prompts: Sequence[str], length: int | None) -> Text:
    """CLIP's last states. `length` is not the caller's to choose: CLIP has its 77 positions."""
    encoder, tokenizer = parts.text_encoders[0], parts.tokenizers[0]
    tokens = tokenizer.encode(prompts)
    states = encoder(tokens.ids.to(_device(encoder))).last
    return Text(states, None, _cut("clip", tokens.truncated))


def _sd_predictor(parts: PipelineParts, conditions: Conditions) -> Predict:
    unet = parts.denoiser
    assert isinstance(unet, UNet)
    channels, latents = unet.config.in_channels, parts.vae.config.latents
    if channels != latents:
        raise UsageError(
            f"this UNet takes {channels} channels, not the {latents} of text to image: "
            "an inpainting or editing model"
        )
    if conditions.guidance is not None:
        raise UsageError("this model takes no distilled guidance; use cfg")
    dtype, device = param_dtype(unet), _device(unet)
    negative = conditions.negative
    texts = [conditions.positive] if negative is None else [negative, conditions.positive]
    context = torch.cat([text.states for text in texts]).to(device, dtype)

    def predict(latents: Tensor, t: float) -> Tensor:
        x = torch.cat([latents] * len(texts)).to(dtype)
        out: Tensor = unet(x, torch.full((len(x),), t, device=device), context).float()
        if negative is None:
            return out
        away, towards = out.chunk(2)
        return guided(towards, away, conditions.cfg)

    return predict


def _flux_encode(parts: PipelineParts, prompts: Sequence[str], length: int | None) -> Text:
    """CLIP's pooled state, and T5's states over `length` tokens: 512, without guidance 256."""
    clip, t5 = parts.text_encoders
    assert isinstance(parts.denoiser, Flux)
    length = length or (512 if parts.denoiser.config.guidance else 256)
    short = parts.tokenizers[0].encode(prompts)
    long = parts.tokenizers[1].encode(prompts, length=length)
    pooled = clip(short.ids.to(_device(clip))).pooled
    states = t5(long.ids.to(_device(t5)))
    return Text(states, pooled, _cut("clip", short.truncated) + _cut("t5", long.truncated))


def _flux_predictor(parts: PipelineParts, conditions: Conditions) -> Predict:
    flux = parts.denoiser
    assert isinstance(flux, Flux)
    channels, latents = flux.config.in_channels, 4 * parts.vae.config.latents
    if channels != latents:
        raise UsageError(
            f"this transformer takes {channels} channels per token, not the {latents} of text to "
            "image: a Fill or Control model"
        )
    dtype, device = param_dtype(flux), _device(flux)
    strength = conditions.guidance
    if strength is None and flux.config.guidance:
        strength = 3.5

    def call(text: Text, tokens: Tensor, t: float, ids: Tensor) -> Tensor:
        assert text.pooled is not None
        batch = len(tokens)
        out: Tensor = flux(
            tokens,
            torch.full((batch,), t, device=device) / parts.scheduler.num_train_timesteps,
            text.states.to(device, dtype),
            text.pooled.to(device, dtype),
            ids,
            torch.zeros(text.states.shape[1], 3, device=device),
            None if strength is None else torch.full((batch,), strength, device=device),
        )
        return out.float()

    def predict(latents: Tensor, t: float) -> Tensor:
        height, width = latents.shape[2:]
        tokens, ids = pack(latents).to(dtype), image_ids(height, width).to(device)
        out = call(conditions.positive, tokens, t, ids)
        if conditions.negative is not None:
            out = guided(out, call(conditions.negative, tokens, t, ids), conditions.cfg)
        return unpack(out, height, width)

    return predict


_SD = Family(patch=1, flow=False, cfg=7.5, encode=_sd_encode, predictor=_sd_predictor)

FAMILIES: Mapping[str, Family] = {
    "sd15": _SD,
    "sd2": _SD,
    "flux1": Family(patch=2, flow=True, cfg=1.0, encode=_flux_encode, predictor=_flux_predictor),
}
