"""Z-Image: Qwen3's last state but one, and a transformer that walks from noise to picture.

The denoiser counts its time the other way round than the loop, and predicts what leads to the
picture, which the loop takes with its sign turned. Texts are of their own length each.
Guidance is what it is elsewhere, 1 is none: diffusers counts guidance_scale from 0, one less.
Source: huggingface/diffusers@58eb52c:src/diffusers/pipelines/z_image/pipeline_z_image.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.families.base import (
    Call,
    Conditions,
    Family,
    PipelineParts,
    Text,
    TextOptions,
    beside_latents,
    device_of,
    no_guidance,
)
from diffquant.runtime.families.chat_prompts import encode_chat
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.models.z_image import ZImage

__all__ = ["Z_IMAGE"]


def _encode(parts: PipelineParts, prompts: Sequence[str], options: TextOptions) -> Text:
    """The prompt as a turn of a chat whose answer may think, as it was trained."""
    found = encode_chat(parts, prompts, options, layers=(-2,))
    (states,) = found.states
    return Text(states, None, found.truncated, mask=found.mask, negative=options.negative)


def _nothing(parts: PipelineParts, positive: Text) -> Text:
    """The empty text."""
    return _encode(parts, [""] * len(positive.states), TextOptions(negative=True))


def _caller(parts: PipelineParts, conditions: Conditions) -> Call:
    transformer = parts.denoiser
    assert isinstance(transformer, ZImage)
    config = transformer.config
    no_guidance(conditions)
    beside_latents(conditions, config.in_channels, parts.vae.config.latents, "transformer")
    dtype, device = param_dtype(transformer), device_of(transformer)

    def call(latents: Tensor, t: float, texts: Sequence[Text]) -> list[Tensor]:
        times = torch.full((len(latents),), t, device=device)
        times = 1 - times / parts.scheduler.num_train_timesteps
        found = []
        for text in texts:
            states = text.states.to(device, dtype)
            if states.shape[2] != config.caption:
                raise UsageError(
                    f"this transformer reads text states {config.caption} wide, the text encoder "
                    f"makes them {states.shape[2]} wide: it is another model's"
                )
            lengths = None if text.mask is None else text.mask.sum(1).tolist()
            found.append(-transformer(latents, times, states, lengths).float())
        return found

    return call


Z_IMAGE = Family(
    needs=("denoiser", "vae", "text_encoder"),
    patch=2,
    flow=True,
    cfg=1.0,
    encode=_encode,
    caller=_caller,
    nothing=_nothing,
)
