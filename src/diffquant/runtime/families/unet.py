"""How the UNets of Stable Diffusion are called: SD1.5, SD2, SDXL and its refiner."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffquant.runtime.families.base import (
    Beside,
    Call,
    Conditions,
    PipelineParts,
    Text,
    beside_latents,
    device_of,
    no_guidance,
)
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.models.unet import UNet

__all__ = ["LCM_GUIDANCE", "unet_beside", "unet_caller"]

# Of latent consistency models: SimianLuo/LCM_Dreamshaper_v7 README.md draws with it.
LCM_GUIDANCE = 8.0


def unet_caller(
    parts: PipelineParts,
    conditions: Conditions,
    label: Callable[[UNet, Text], Tensor] | None = None,
) -> Call:
    """Call a UNet once for all texts, as one batch.

    Args:
        parts: the denoiser is a UNet.
        conditions: of the run.
        label: (unet, text) -> (B, width) extra vector, for models that have `label_emb`.

    Raises:
        UsageError: distilled guidance, or channels, that the UNet does not take.
    """
    unet = parts.denoiser
    assert isinstance(unet, UNet)
    if unet.config.guidance is None:
        no_guidance(conditions)
    strength = LCM_GUIDANCE if conditions.guidance is None else conditions.guidance
    beside = beside_latents(conditions, unet.config.in_channels, parts.vae.config.latents, "UNet")
    dtype, device = param_dtype(unet), device_of(unet)

    def call(latents: Tensor, t: float, texts: Sequence[Text]) -> list[Tensor]:
        if len({text.states.shape[1] for text in texts}) > 1:  # one of them takes more chunks
            return [found for text in texts for found in call(latents, t, [text])]
        context = torch.cat([text.states for text in texts]).to(device, dtype)
        shown = latents if beside is None else torch.cat((latents, beside.to(latents)), dim=1)
        x = torch.cat([shown] * len(texts)).to(dtype)
        times = torch.full((len(x),), t, device=device)
        vector = None
        if label is not None:
            vector = torch.cat([label(unet, text) for text in texts]).to(device, dtype)
        guidance = None
        if unet.config.guidance is not None:
            guidance = torch.full((len(x),), strength, device=device)
        out: Tensor = unet(x, times, context, vector, guidance).float()
        return list(out.chunk(len(texts)))

    return call


def unet_beside(parts: PipelineParts) -> Beside | None:
    """An inpainting UNet is shown the mask, then the latents of the picture without its hole.

    Source: huggingface/diffusers 0.42 pipelines/stable_diffusion/
    pipeline_stable_diffusion_inpaint.py
    """
    unet = parts.denoiser
    assert isinstance(unet, UNet)
    if unet.config.in_channels != 2 * parts.vae.config.latents + 1:
        return None

    def beside(mask: Tensor, masked: Tensor) -> Tensor:
        return torch.cat((interpolate(mask, size=masked.shape[-2:]).to(masked), masked), dim=1)

    return beside
