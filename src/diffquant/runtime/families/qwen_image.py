"""Qwen-Image: Qwen2.5-VL's last states of a prompt in a template, 2x2 latent pixels per token.

Source: huggingface/diffusers@58eb52c:src/diffusers/pipelines/qwenimage/pipeline_qwenimage.py: the
template, what is dropped of it, the lengths, and guidance that keeps the norm of every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffquant.core.errors import ArchitectureError, UsageError
from diffquant.runtime.families.base import (
    Call,
    Conditions,
    Family,
    PipelineParts,
    Text,
    TextOptions,
    beside_latents,
    cut_off,
    device_of,
    no_guidance,
)
from diffquant.runtime.guidance import guided
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.models.flux import pack, unpack
from diffquant.runtime.models.qwen_image import QwenImage
from diffquant.runtime.models.qwen_text import QwenText

__all__ = ["QWEN_IMAGE"]

_BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
# The template's own tokens before the prompt are not shown to the denoiser; the number is that of
# Qwen's tokenizer, and is used with any other one too.
_DROPPED = 34
_LENGTH, _LONGEST = 512, 1024  # tokens after those; the pipeline's default and limit


def _encode(parts: PipelineParts, prompts: Sequence[str], options: TextOptions) -> Text:
    """States of the templated prompts, without the template's beginning.

    Raises:
        UsageError: more tokens than the model was made for.
    """
    encoder, backend = parts.text_encoders[0], parts.tokenizers[0].backend
    assert isinstance(encoder, QwenText)
    length = options.tokens or _LENGTH
    if not 1 <= length <= _LONGEST:
        raise UsageError(f"text tokens must be 1 to {_LONGEST}, found {length}")
    closing = len(backend.encode(_AFTER, add_special_tokens=False).ids)
    rows, rests = [], []
    for prompt in prompts:
        ids = backend.encode(_BEFORE + prompt + _AFTER, add_special_tokens=False).ids
        kept, rest = ids[: _DROPPED + length], ids[_DROPPED + length : -closing]
        rows.append(torch.tensor(kept, dtype=torch.int64, device=device_of(encoder)))
        rests.append(backend.decode(rest, skip_special_tokens=False).strip())
    counts = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    mask = pad_sequence(counts, batch_first=True)
    (states,) = encoder(pad_sequence(rows, batch_first=True), mask)
    states, mask = states[:, _DROPPED:], mask[:, _DROPPED:]
    states = states.masked_fill(~mask[..., None], 0.0)
    return Text(
        states,
        None,
        cut_off("qwen", rests),
        mask=None if bool(mask.all()) else mask,
        negative=options.negative,
    )


def _nothing(parts: PipelineParts, positive: Text) -> Text:
    """A space, as the model's card has it: without guidance from it pictures come out wrong."""
    return _encode(parts, [" "] * len(positive.states), TextOptions(negative=True))


def _caller(parts: PipelineParts, conditions: Conditions) -> Call:
    transformer = parts.denoiser
    assert isinstance(transformer, QwenImage)
    config = transformer.config
    no_guidance(conditions)
    if config.condition or config.layered:
        raise ArchitectureError(
            "Qwen-Image-Layered takes a picture apart: it makes none from text, and the runtime "
            "has no layers yet; the file can be inspected, converted and verified at tensor level"
        )
    beside_latents(conditions, config.in_channels // 4, parts.vae.config.latents, "transformer")
    dtype, device = param_dtype(transformer), device_of(transformer)

    def call(latents: Tensor, t: float, texts: Sequence[Text]) -> list[Tensor]:
        batch, _, height, width = latents.shape
        tokens, sizes = pack(latents).to(dtype), [(1, height // 2, width // 2)]
        times = torch.full((batch,), t, device=device) / parts.scheduler.num_train_timesteps
        found = []
        for text in texts:
            out = transformer(tokens, times, text.states.to(device, dtype), sizes, text.mask)
            found.append(unpack(out.float(), height, width))
        return found

    return call


def _guide(positive: Tensor, negative: Tensor, cfg: float) -> Tensor:
    """Guidance that turns the prediction of every token, and leaves it as long as it was."""
    height, width = positive.shape[2:]
    wanted = pack(positive).norm(dim=-1, keepdim=True)
    tokens = pack(guided(positive, negative, cfg))
    return unpack(tokens * (wanted / tokens.norm(dim=-1, keepdim=True)), height, width)


QWEN_IMAGE = Family(
    needs=("denoiser", "vae", "text_encoder"),
    patch=2,
    flow=True,
    cfg=4.0,
    encode=_encode,
    caller=_caller,
    nothing=_nothing,
    guide=_guide,
)
