"""Text to image: encode the prompt, walk from noise to latents, decode.

Noise is drawn as diffusers draws it: float32 from torch's CPU generator, in the latents' shape, so
`torch.Generator("cpu").manual_seed(seed)` there and `seed` here start from the same noise, on any
device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from diffquant.core.errors import UnknownFormat, UsageError, VerificationError
from diffquant.runtime.families import (
    FAMILIES,
    Conditions,
    Family,
    PipelineParts,
    Text,
    TextOptions,
)
from diffquant.runtime.families.base import device_of
from diffquant.runtime.guidance import needs_negative
from diffquant.runtime.models.autoencoder import to_pixels
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.samplers import default_sampler, make_sampler

__all__ = ["Generated", "OnStep", "Pipeline", "PipelineParts"]

OnStep: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Generated:
    """The result of a run.

    Attributes:
        images: (B, H, W, 3) float32 in [0, 1], on the CPU.
        latents: (B, C, h, w) float32 as the denoiser left them, on the CPU.
        sampler: name of the sampler used.
        calls: model evaluations per picture.
        truncated: what the tokenizers cut off, "clip: ..." or "t5: ...", negative prompts included.
    """

    images: Tensor
    latents: Tensor
    sampler: str
    calls: int
    truncated: tuple[str, ...]


def initial_noise(shape: tuple[int, int, int], seed: int | Sequence[int], count: int) -> Tensor:
    """Draw `count` samples of `shape`: float32 on the CPU.

    One seed draws the whole batch from one generator; a sequence draws each sample from its own.
    """
    if isinstance(seed, int):
        return torch.randn((count, *shape), generator=torch.Generator("cpu").manual_seed(seed))
    if len(seed) != count:
        raise UsageError(f"{len(seed)} seeds for {count} pictures: give one, or one per picture")
    generators = [torch.Generator("cpu").manual_seed(one) for one in seed]
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


class Pipeline:
    """Generates pictures with parts that are already in memory."""

    def __init__(self, parts: PipelineParts) -> None:
        """Take the parts.

        Raises:
            UnknownFormat: no family of that architecture.
        """
        if parts.architecture not in FAMILIES:
            raise UnknownFormat(parts.architecture, FAMILIES, what="architecture with a runtime")
        self.parts = parts
        self.family: Family = FAMILIES[parts.architecture]

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        negative: str | None = None,
        *,
        seed: int | Sequence[int] = 0,
        steps: int = 20,
        cfg: float | None = None,
        width: int = 512,
        height: int = 512,
        sampler: str | None = None,
        guidance: float | None = None,
        batch: int = 1,
        text_tokens: int | None = None,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Generated:
        """Generate pictures.

        Args:
            prompt: one, or several that run as one batch.
            negative: what to stay away from, needs cfg > 1; absent: "" for SD, no guidance for
                Flux.
            seed: one for the batch, or one per picture.
            steps: sampler steps.
            cfg: strength of classifier-free guidance, 1 is off; default: the family's.
            width: pixels, a multiple of 8 (SD) or 16 (Flux).
            height: likewise.
            sampler: key of SAMPLERS; default: what the checkpoint's scheduler asks for.
            guidance: distilled guidance of Flux dev, default 3.5.
            batch: pictures per prompt.
            text_tokens: T5 tokens of Flux, default 512, schnell 256.
            latents: (B, C, h, w) noise to start from instead of drawing it.
            on_step: called after each model call with (done, total).

        Raises:
            UsageError: a size, seed count, sampler or guidance the model cannot take.
            VerificationError: latents are not finite; the message says at which step.
        """
        parts, family = self.parts, self.family
        prompts = [
            p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(batch)
        ]
        shape = self._latent_shape(width, height)
        cfg = family.cfg if cfg is None else cfg
        options = TextOptions(text_tokens)
        positive = family.encode(parts, prompts, options)
        opposite = self._negative(negative, positive, cfg, options)
        texts = (positive,) if opposite is None else (opposite, positive)
        call = family.caller(parts, Conditions((width, height), guidance))
        name = sampler or default_sampler(parts.scheduler, flow=family.flow)
        tokens = shape[1] * shape[2] // family.patch**2
        facts = parts.scheduler
        facts = facts if family.schedule is None else family.schedule(facts, tokens, steps)
        run = make_sampler(name, facts, steps=steps, tokens=tokens, flow=family.flow)
        noise = initial_noise(shape, seed, len(prompts)) if latents is None else latents
        device = device_of(parts.denoiser)
        x = noise.to(device, torch.float32) * run.init_scale
        for index, t in enumerate(run.timesteps):
            found = call(run.scale_input(x, index), t, texts)
            out = found[0] if len(found) == 1 else family.guide(found[1], found[0], cfg)
            x = run.step(out, x, index)
            if not bool(torch.isfinite(x).all()):
                total = len(run.timesteps)
                raise VerificationError(
                    f"latents are not finite after step {index + 1} of {total}: "
                    "try compute dtype float32"
                )
            if on_step is not None:
                on_step(index + 1, len(run.timesteps))
        cut = positive.truncated + (opposite.truncated if opposite else ())
        images = self.decode(x)
        return Generated(images, x.cpu(), name, len(run.timesteps), tuple(dict.fromkeys(cut)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to pictures (B, H, W, 3) float32 in [0, 1], one by one."""
        vae = self.parts.vae
        device = device_of(vae)
        z = vae.unscale(latents.to(device, torch.float32)).to(param_dtype(vae))
        return torch.cat([to_pixels(vae.decode(one)).cpu() for one in z[:, None]])

    def _latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        factor = self.parts.vae.config.factor
        multiple = factor * self.family.patch
        if min(width, height) < multiple or width % multiple or height % multiple:
            near = [max(1, round(size / multiple)) * multiple for size in (width, height)]
            raise UsageError(
                f"width and height must be multiples of {multiple}, found {width}x{height}, "
                f"nearest {near[0]}x{near[1]}"
            )
        return self.parts.vae.config.latents, height // factor, width // factor

    def _negative(
        self, text: str | None, positive: Text, cfg: float, options: TextOptions
    ) -> Text | None:
        """Encode the negative prompt, where guidance is on; flows also need one to be given."""
        if text and not needs_negative(cfg):
            raise UsageError(f"a negative prompt has no effect with cfg {cfg:g}: use cfg above 1")
        if not needs_negative(cfg):
            return None
        if self.parts.distilled:
            raise UsageError(f"this model is distilled: it runs without guidance, not cfg {cfg:g}")
        if text is None and self.family.nothing is not None:
            nothing = self.family.nothing(self.parts, positive)
            if nothing is not None:
                return nothing
        elif text is None and self.family.flow:
            return None
        count = len(positive.states)
        options = replace(options, negative=True)
        return self.family.encode(self.parts, [text or ""] * count, options)
