"""SDXL and its refiner: penultimate CLIP states, a pooled vector, and numbers about the picture.

The UNet's extra vector is the pooled text of OpenCLIP-bigG, then sinusoids of some numbers: the
base is told original size, crop and target size (each height first), the refiner original size,
crop and an aesthetic score. Sizes are those of the picture, crops are 0.
Source: huggingface/diffusers@58eb52c:src/diffusers/pipelines/stable_diffusion_xl/
pipeline_stable_diffusion_xl.py and pipeline_stable_diffusion_xl_img2img.py (_get_add_time_ids, and
the default scores).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffquant.core.errors import ArchitectureError
from diffquant.runtime.families.base import (
    Call,
    Conditions,
    Family,
    PipelineParts,
    Text,
    TextOptions,
)
from diffquant.runtime.families.clip_prompts import encode_clip
from diffquant.runtime.families.unet import unet_beside, unet_caller
from diffquant.runtime.models.clip import ClipText
from diffquant.runtime.models.facts import timestep_embedding
from diffquant.runtime.models.unet import UNet

__all__ = ["REFINER", "SDXL"]

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


def _encode(parts: PipelineParts, prompts: Sequence[str], options: TextOptions) -> Text:
    """States of all encoders side by side; pooled: the last encoder's, projected."""
    found = []
    for encoder, tokenizer in zip(parts.text_encoders, parts.tokenizers, strict=True):
        assert isinstance(encoder, ClipText)
        found.append(encode_clip(encoder, tokenizer, prompts, options, skip=2, normed=False))
    states = torch.cat([one.states for one in found], dim=-1)
    truncated = tuple(dict.fromkeys(text for one in found for text in one.truncated))
    return Text(states, found[-1].pooled, truncated, negative=options.negative)


def _zeros(parts: PipelineParts, positive: Text) -> Text | None:
    """The base was trained with zeros where nothing was asked, not with the text "".

    Source: `force_zeros_for_empty_prompt` of its model_index.json.
    """
    if not parts.zeros_for_empty:
        return None
    assert positive.pooled is not None
    zeros = torch.zeros_like
    return Text(zeros(positive.states), zeros(positive.pooled), negative=True)


def _numbers(unet: UNet, text: Text, numbers: Sequence[float]) -> Tensor:
    """Pooled text and sinusoids of `numbers`: (B, unet.config.label)."""
    pooled = text.pooled
    assert pooled is not None
    left = (unet.config.label or 0) - pooled.shape[1]
    if left <= 0 or left % len(numbers):
        raise ArchitectureError(
            f"the UNet's extra vector has {unet.config.label} numbers: expected {pooled.shape[1]} "
            f"of pooled text and {len(numbers)} sinusoids of equal width"
        )
    waves = timestep_embedding(torch.tensor(numbers), left // len(numbers))
    row = waves.reshape(1, -1).expand(len(pooled), -1).to(pooled)
    return torch.cat((pooled, row), dim=-1)


def _base(parts: PipelineParts, conditions: Conditions) -> Call:
    width, height = conditions.size
    sizes = (height, width, 0, 0, height, width)
    return unet_caller(parts, conditions, lambda unet, text: _numbers(unet, text, sizes))


def _refiner(parts: PipelineParts, conditions: Conditions) -> Call:
    width, height = conditions.size

    def label(unet: UNet, text: Text) -> Tensor:
        score = NEGATIVE_AESTHETIC_SCORE if text.negative else AESTHETIC_SCORE
        return _numbers(unet, text, (height, width, 0, 0, score))

    return unet_caller(parts, conditions, label)


SDXL = Family(
    needs=("denoiser", "vae", "text_encoder", "text_encoder_2"),
    patch=1,
    flow=False,
    cfg=5.0,
    encode=_encode,
    caller=_base,
    beside=unet_beside,
    nothing=_zeros,
)
REFINER = Family(
    needs=("denoiser", "vae", "text_encoder_2"),
    patch=1,
    flow=False,
    cfg=5.0,
    encode=_encode,
    caller=_refiner,
    beside=unet_beside,
)
