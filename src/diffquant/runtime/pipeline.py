"""Text to image: encode the prompt, walk from noise to latents, decode.

Noise is drawn as diffusers draws it: float32 from torch's CPU generator, in the latents' shape, so
`torch.Generator("cpu").manual_seed(seed)` there and `seed` here start from the same noise, on any
device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

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
from diffquant.runtime.guidance import Guidance, needs_negative
from diffquant.runtime.models.autoencoder import from_pixels, to_pixels
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.samplers import Part, default_sampler, make_sampler

__all__ = ["Generated", "OnLatents", "OnPhase", "OnStep", "Pipeline", "PipelineParts"]

OnStep: TypeAlias = Callable[[int, int], None]
OnLatents: TypeAlias = Callable[[int, int, Tensor], None]
OnPhase: TypeAlias = Callable[[str, int], None]


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

    def generate(
        self,
        prompt: str | Sequence[str],
        negative: str | None = None,
        *,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        **fields: Any,  # noqa: ANN401
    ) -> Generated:
        """Generate pictures; `fields` are those of PictureRequest.

        One seed draws the noise of the whole batch, as diffusers does; see `run`.
        """
        prompts = prompt if isinstance(prompt, str) else tuple(prompt)
        request = PictureRequest(prompts, negative, **fields)
        if latents is None:
            count = request.batch * (1 if isinstance(prompts, str) else len(prompts))
            shape = self._latent_shape(request.width, request.height)
            latents = initial_noise(shape, request.seed, count)
        return self.run(request, latents=latents, on_step=on_step)

    @torch.no_grad()
    def run(
        self,
        request: PictureRequest,
        *,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
        on_phase: OnPhase | None = None,
    ) -> Generated:
        """Generate pictures.

        Args:
            request: what to draw; of one seed, each picture of a batch takes the next.
            latents: (B, C, h, w) noise to start from instead of drawing it; with `begin`, what the
                model of the earlier part left.
            on_step: called after each model call with (done, total).
            on_latents: called after each model call with (index, total, latents (B, C, h, w)).
            on_phase: called before "encode", "denoise" and "decode" with (name, steps of it).

        Raises:
            UsageError: a size, seed count, sampler or guidance the model cannot take.
            VerificationError: latents are not finite; the message says at which step.
        """
        parts, family = self.parts, self.family
        tell = on_phase or (lambda _name, _steps: None)
        if request.mask is not None or request.prompt_style not in ("comfy", "plain"):
            raise UsageError("masks and prompt styles are not run yet")
        if request.rng != "cpu":
            raise UsageError(f"noise {request.rng!r} is not drawn yet, use cpu")
        named = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        prompts = [one for one in named for _ in range(request.batch)]
        seeds = request.seed
        if isinstance(seeds, int):
            seeds = tuple(seeds + i for i in range(len(prompts)))
        shape = self._latent_shape(request.width, request.height)
        guide = Guidance(
            family.cfg if request.cfg is None else request.cfg,
            rescale=request.cfg_rescale,
            cutoff=request.cfg_cutoff,
        )
        options = TextOptions(request.text_tokens, request.clip_skip)
        tell("encode", 1)
        positive = family.encode(parts, prompts, options)
        opposite = self._negative(request.negative, positive, guide.cfg, options)
        call = family.caller(parts, Conditions((request.width, request.height), request.guidance))
        name = request.sampler or default_sampler(parts.scheduler, flow=family.flow)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

        def draw(size: Sequence[int]) -> Tensor:
            each = [torch.randn((1, *size[1:]), generator=one) for one in generators]
            return torch.cat(each)

        if latents is None:
            latents = initial_noise(shape, seeds, len(prompts))
            for generator in generators:  # noise of steps goes on after that of the start
                torch.randn((1, *shape), generator=generator)
        run = make_sampler(
            name,
            parts.scheduler,
            steps=request.steps,
            tokens=shape[1] * shape[2] // family.patch**2,
            flow=family.flow,
            schedule=request.schedule,
            shift=request.shift,
            part=_part(request),
            draw=draw,
            eta=request.eta,
            architecture=parts.architecture,
        )
        device = device_of(parts.denoiser)
        x = latents.to(device, torch.float32)
        if request.image is not None:
            x = run.add_noise(self._encoded(request.image, len(prompts)).to(x), x, 0)
        elif request.begin == 0:
            x = x * run.init_scale
        total = len(run.timesteps)
        tell("denoise", total)
        for index, t in enumerate(run.timesteps):
            now = guide.at(index, total) if opposite is not None else Guidance()
            texts: tuple[Text, ...] = (positive,)
            if opposite is not None and now.needs_negative:
                texts = (opposite, positive)
            found = call(run.scale_input(x, index), t, texts)
            x = run.step(found[0] if len(found) == 1 else now.apply(found[1], found[0]), x, index)
            if not bool(torch.isfinite(x).all()):
                raise VerificationError(
                    f"latents are not finite after step {index + 1} of {total}: "
                    "try compute dtype float32"
                )
            if on_step is not None:
                on_step(index + 1, total)
            if on_latents is not None:
                on_latents(index, total, x)
        cut = positive.truncated + (opposite.truncated if opposite else ())
        tell("decode", 1)
        images = self.decode(x)
        return Generated(images, x.cpu(), name, total, tuple(dict.fromkeys(cut)))

    def _encoded(self, image: Tensor, count: int) -> Tensor:
        """Latents of a picture (1 or B, H, W, 3) in [0, 1]."""
        vae = self.parts.vae
        pixels = from_pixels(image.expand(count, -1, -1, -1))
        mean, _ = vae.encode(pixels.to(device_of(vae), param_dtype(vae)))
        return vae.scale(mean.float())

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
        if not needs_negative(cfg) or (text is None and self.family.flow):
            return None
        if text is None and self.family.nothing is not None:
            nothing = self.family.nothing(self.parts, positive)
            if nothing is not None:
                return nothing
        count = len(positive.states)
        options = replace(options, negative=True)
        return self.family.encode(self.parts, [text or ""] * count, options)


def _part(request: PictureRequest) -> Part:
    """Which part of the noise range is run."""
    if request.image is not None:
        return Part(strength=request.strength)
    return Part(start=request.begin, stop=request.end)
