"""Flux.2 with Qwen3 as its text encoder (klein): three of its layers side by side.

All 512 places of a prompt are shown to the denoiser, padding too: it was trained so. How far the
schedule leans towards noise depends on the picture's size and on the number of steps, by a fit of
Black Forest Labs. Distilled members are called once per step; base ones take classifier-free
guidance. Dev reads Mistral 3, which the runtime has no model of; what it takes besides (its
distilled guidance) is served.
Source: huggingface/diffusers@58eb52c:src/diffusers/pipelines/flux2/pipeline_flux2_klein.py,
compute_empirical_mu and _get_qwen3_prompt_embeds; pipeline_flux2.py, guidance_scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
from diffquant.runtime.families.chat_prompts import NO_THOUGHT, encode_chat
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.models.flux2 import Flux2
from diffquant.runtime.schedules import SchedulerFacts

__all__ = ["FLUX2"]

_LAYERS = (9, 18, 27)
_GUIDANCE = 4.0  # dev
# Lines in the number of tokens, of runs of 10 and 200 steps; beyond so many tokens the second.
_TEN, _TWO_HUNDRED, _MANY = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666), 4300


def _encode(parts: PipelineParts, prompts: Sequence[str], options: TextOptions) -> Text:
    """The prompt as a turn of a chat whose answer does not think."""
    found = encode_chat(parts, prompts, options, layers=_LAYERS, answer=NO_THOUGHT, padded=True)
    states = torch.cat(found.states, dim=-1)
    return Text(states, None, found.truncated, negative=options.negative)


def _nothing(parts: PipelineParts, positive: Text) -> Text:
    """The empty text, of as many tokens."""
    batch, tokens = positive.states.shape[:2]
    return _encode(parts, [""] * batch, TextOptions(tokens=tokens, negative=True))


def _caller(parts: PipelineParts, conditions: Conditions) -> Call:
    transformer = parts.denoiser
    assert isinstance(transformer, Flux2)
    config = transformer.config
    if not config.guidance:
        no_guidance(conditions)
    beside_latents(conditions, config.in_channels, parts.vae.config.latents, "transformer")
    dtype, device = param_dtype(transformer), device_of(transformer)
    strength = _GUIDANCE if conditions.guidance is None else conditions.guidance

    def call(latents: Tensor, t: float, texts: Sequence[Text]) -> list[Tensor]:
        batch = len(latents)
        times = torch.full((batch,), t, device=device) / parts.scheduler.num_train_timesteps
        guidance = torch.full((batch,), strength, device=device) if config.guidance else None
        found = []
        for text in texts:
            states = text.states.to(device, dtype)
            if states.shape[2] != config.context:
                raise UsageError(
                    f"this transformer reads text states {config.context} wide, three layers of "
                    f"the text encoder are {states.shape[2]} wide: it is another model's"
                )
            found.append(transformer(latents, times, states, guidance).float())
        return found

    return call


def _schedule(facts: SchedulerFacts, tokens: int, steps: int) -> SchedulerFacts:
    """The same schedule, its dynamic shift for this size and number of steps."""
    (slope_10, at_10), (slope_200, at_200) = _TEN, _TWO_HUNDRED
    mu = slope_200 * tokens + at_200
    if tokens <= _MANY:
        slope = (mu - (slope_10 * tokens + at_10)) / 190.0
        mu = slope * steps + (mu - 200.0 * slope)
    return replace(facts, base_shift=mu, max_shift=mu)


FLUX2 = Family(
    needs=("denoiser", "vae", "text_encoder"),
    patch=1,
    flow=True,
    cfg=1.0,
    encode=_encode,
    caller=_caller,
    nothing=_nothing,
    schedule=_schedule,
)
