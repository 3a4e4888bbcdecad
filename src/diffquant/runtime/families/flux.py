"""Flux.1: T5 states, CLIP's pooled state, 2x2 latent pixels per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from diffquant.runtime.families.base import (
    Beside,
    Call,
    Conditions,
    Family,
    PipelineParts,
    Text,
    TextOptions,
    beside_latents,
    cut_off,
    device_of,
    no_clip_skip,
)
from diffquant.runtime.families.line_prompts import encode_lines
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.models.flux import Flux, image_ids, pack, unpack
from diffquant.runtime.prompts import plain_text

__all__ = ["FLUX"]

# huggingface/diffusers@58eb52c:src/diffusers/pipelines/flux/pipeline_flux.py, guidance_scale.
GUIDANCE = 3.5


def _encode(parts: PipelineParts, prompts: Sequence[str], options: TextOptions) -> Text:
    """CLIP's pooled state, and T5's states over 512 tokens, 256 for models without guidance."""
    clip, t5 = parts.text_encoders
    assert isinstance(parts.denoiser, Flux)
    no_clip_skip(options)
    length = options.tokens or (512 if parts.denoiser.config.guidance else 256)
    short = parts.tokenizers[0].encode([plain_text(one, options.style) for one in prompts])
    pooled = clip(short.ids.to(device_of(clip))).pooled
    long = encode_lines(t5, parts.tokenizers[1], prompts, options, length=length)
    truncated = cut_off("clip", short.truncated) + cut_off("t5", long.truncated)
    return Text(long.states, pooled, truncated, negative=options.negative)


def _beside(parts: PipelineParts) -> Beside | None:
    """Fill is shown the latents of the picture without its hole, then the mask, pixel by pixel.

    Source: huggingface/diffusers 0.42 pipelines/flux/pipeline_flux_fill.py prepare_mask_latents;
    the mask's channel 8 y + x of a latent pixel is its pixel (y, x).
    """
    assert isinstance(parts.denoiser, Flux)
    factor = parts.vae.config.factor
    latents = parts.vae.config.latents
    if parts.denoiser.config.in_channels // 4 != 2 * latents + factor**2:
        return None
    return lambda mask, masked: torch.cat((masked, pixel_unshuffle(mask, factor).to(masked)), dim=1)


def _caller(parts: PipelineParts, conditions: Conditions) -> Call:
    flux = parts.denoiser
    assert isinstance(flux, Flux)
    beside = beside_latents(
        conditions, flux.config.in_channels // 4, parts.vae.config.latents, "transformer"
    )
    dtype, device = param_dtype(flux), device_of(flux)
    strength = conditions.guidance
    if strength is None and flux.config.guidance:
        strength = GUIDANCE

    def call(latents: Tensor, t: float, texts: Sequence[Text]) -> list[Tensor]:
        batch, _, height, width = latents.shape
        shown = latents if beside is None else torch.cat((latents, beside.to(latents)), dim=1)
        tokens, ids = pack(shown).to(dtype), image_ids(height, width)
        times = torch.full((batch,), t, device=device) / parts.scheduler.num_train_timesteps
        guidance = None if strength is None else torch.full((batch,), strength, device=device)
        found = []
        for text in texts:
            assert text.pooled is not None
            states, pooled = text.states.to(device, dtype), text.pooled.to(device, dtype)
            places = torch.zeros(states.shape[1], 3)
            out = flux(tokens, times, states, pooled, ids, places, guidance)
            found.append(unpack(out.float(), height, width))
        return found

    return call


FLUX = Family(
    needs=("denoiser", "vae", "text_encoder", "text_encoder_2"),
    patch=2,
    flow=True,
    cfg=1.0,
    encode=_encode,
    caller=_caller,
    beside=_beside,
)
