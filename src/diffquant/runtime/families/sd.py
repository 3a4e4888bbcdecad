"""SD1.5 and SD2: one CLIP encoder, its normed states, a UNet."""

from __future__ import annotations

from collections.abc import Sequence

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

__all__ = ["SD"]


def _encode(parts: PipelineParts, prompts: Sequence[str], options: TextOptions) -> Text:
    """CLIP's last states; SD2's encoder comes without the layer that is never read."""
    encoder = parts.text_encoders[0]
    assert isinstance(encoder, ClipText)
    found = encode_clip(encoder, parts.tokenizers[0], prompts, options)
    return Text(found.states, None, found.truncated, negative=options.negative)


def _caller(parts: PipelineParts, conditions: Conditions) -> Call:
    return unet_caller(parts, conditions)


SD = Family(
    needs=("denoiser", "vae", "text_encoder"),
    patch=1,
    flow=False,
    cfg=7.5,
    encode=_encode,
    caller=_caller,
    beside=unet_beside,
)
