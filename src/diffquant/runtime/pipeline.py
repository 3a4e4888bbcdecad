"""From a request to pictures: encode the prompt, walk from noise to latents, decode.

The loop is here; where it starts from is told by inpaint.py, noise by noise.py. Noise is drawn as
diffusers draws it: float32 from torch's CPU generator, in the latents' shape, so
`torch.Generator("cpu").manual_seed(seed)` there and `seed` here start from the same noise, on any
device. Of a batch each picture has a generator of its own, as if it were made alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from diffquant.core.errors import UnknownFormat, UsageError, VerificationError
from diffquant.runtime.devices import full_float32
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
from diffquant.runtime.inpaint import Start, paste, start
from diffquant.runtime.memory.placement import Placement
from diffquant.runtime.models.autoencoder import to_pixels
from diffquant.runtime.models.facts import param_dtype
from diffquant.runtime.models.unet import UNet
from diffquant.runtime.noise import NoiseSource
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.samplers import Part, Sampler, default_sampler, make_sampler
from diffquant.runtime.strips import Decoding, decode_in

__all__ = ["Denoised", "Generated", "OnLatents", "OnStep", "Pipeline", "PipelineParts"]

_Result = TypeVar("_Result")

OnStep: TypeAlias = Callable[[int, int], None]
OnLatents: TypeAlias = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, slots=True)
class Denoised:
    """What a run leaves before it is decoded.

    Attributes:
        latents: (B, C, h, w) float32 as the denoiser left them, on its device.
        sampler: name of the sampler used.
        calls: model evaluations per picture, guidance not counted.
        truncated: what the tokenizers cut off, "clip: ..." or "t5: ...", negative prompts included.
    """

    latents: Tensor
    sampler: str
    calls: int
    truncated: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Generated:
    """The result of a run.

    Attributes:
        images: (B, H, W, 3) float32 in [0, 1], on the CPU.
        latents: (B, C, h, w) float32 as the denoiser left them, on the CPU.
        sampler, calls, truncated: as in Denoised.
        seeds: one per picture.
    """

    images: Tensor
    latents: Tensor
    sampler: str
    calls: int
    truncated: tuple[str, ...]
    seeds: tuple[int, ...] = ()


class Pipeline:
    """Generates pictures.

    Attributes:
        parts: their weights in memory, or brought by the placement.
        placement: runs each piece of work, and again with less memory when that runs out.
    """

    def __init__(self, parts: PipelineParts, placement: Placement | None = None) -> None:
        """Take the parts.

        Raises:
            UnknownFormat: no family of that architecture.
        """
        if parts.architecture not in FAMILIES:
            raise UnknownFormat(parts.architecture, FAMILIES, what="architecture with a runtime")
        self.parts, self.placement = parts, placement
        self.family: Family = FAMILIES[parts.architecture]

    @property
    def cfg(self) -> float:
        """Default strength of guidance: the family's, none for a UNet that was distilled with it.

        Source: huggingface/diffusers 0.42 pipelines/stable_diffusion/pipeline_stable_diffusion.py
        do_classifier_free_guidance.
        """
        denoiser = self.parts.denoiser
        inside = isinstance(denoiser, UNet) and denoiser.config.guidance is not None
        return 1.0 if inside else self.family.cfg

    @property
    def multiple(self) -> int:
        """What width and height must be multiples of, in pixels."""
        return self.parts.vae.config.factor * self.family.patch

    def generate(
        self,
        prompt: str | Sequence[str],
        negative: str | None = None,
        *,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
        **fields: Any,  # noqa: ANN401 (what PictureRequest takes)
    ) -> Generated:
        """Generate pictures: `run` of a PictureRequest with these fields; lists may be given."""
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        prompts = prompt if isinstance(prompt, str) else tuple(prompt)
        request = PictureRequest(prompts, negative, **fields)
        return self.run(request, latents=latents, on_step=on_step, on_latents=on_latents)

    def run(
        self,
        request: PictureRequest,
        *,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
    ) -> Generated:
        """Make the pictures of a request; see `denoise` for arguments and errors."""
        found = self.denoise(request, latents=latents, on_step=on_step, on_latents=on_latents)
        images = paste(request, self.decode(found.latents))
        return Generated(
            images=images,
            latents=found.latents.cpu(),
            sampler=found.sampler,
            calls=found.calls,
            truncated=found.truncated,
            seeds=request.seeds,
        )

    @torch.no_grad()
    @full_float32()
    def denoise(
        self,
        request: PictureRequest,
        *,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> Denoised:
        """Walk from noise, or from a picture, to latents; see `walk` for arguments and errors."""
        return self.walk(
            request, latents=latents, on_step=on_step, on_latents=on_latents, on_start=on_start
        )

    def walk(
        self,
        request: PictureRequest,
        *,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
        on_latents: OnLatents | None = None,
        on_start: Callable[[int], None] | None = None,
    ) -> Denoised:
        """As `denoise`, with gradients where the caller has them on.

        Args:
            request: what is wanted.
            latents: (B, C, h, w) noise instead of drawing it; with `request.begin`, the latents
                that another model stopped at.
            on_step: called after each model call with (done, total).
            on_latents: called after each model call with (index, total, latents (B, C, h, w)): the
                picture without noise, as the model now sees it.
            on_start: called with the number of model calls, once all texts are encoded.

        Raises:
            UsageError: a size, sampler, guidance or mask the model cannot take.
            VerificationError: latents are not finite; the message says at which step.
        """
        parts, family = self.parts, self.family
        count = len(request.prompts)
        shape = (count, *self._latent_shape(request.width, request.height))
        cfg = self.cfg if request.cfg is None else request.cfg
        guide = Guidance(cfg, request.cfg_rescale, request.cfg_cutoff)
        positive, opposite = self._attempt(lambda: self._texts(request, cfg), "encode")
        noise = NoiseSource(request.seeds, request.rng)
        name = request.sampler or default_sampler(parts.scheduler, flow=family.flow)
        run = self._sampler(name, request, shape, noise)

        def begin() -> Start:
            noise.restart()
            return start(parts, family, request, run, noise, shape, latents, self._decoding)

        begun = self._attempt(begin, "encode picture", autoencoder=True)
        size = (request.width, request.height)
        call = family.caller(parts, Conditions(size, request.guidance, begun.beside))
        x, total = begun.latents, len(run.timesteps)
        if on_start is not None:
            on_start(total)
        for index, t in enumerate(run.timesteps):
            now = guide.at(index, total)
            guided = opposite is not None and now.needs_negative
            texts = (opposite, positive) if opposite is not None and guided else (positive,)
            scaled = run.scale_input(x, index)
            found = self._attempt(
                functools.partial(call, scaled, t, texts), f"step {index + 1} of {total}"
            )
            output = now.apply(found[1], found[0], family.guide) if guided else found[0]
            clean = run.estimate(output, x, index) if on_latents is not None else None
            x = begun.protect(run.step(output, x, index), run, index + 1)
            if not bool(torch.isfinite(x).all()):
                raise VerificationError(
                    f"latents are not finite after step {index + 1} of {total}: "
                    "try compute dtype float32"
                )
            if on_step is not None:
                on_step(index + 1, total)
            if on_latents is not None and clean is not None:
                on_latents(index, total, clean)
        cut = positive.truncated + (opposite.truncated if opposite else ())
        return Denoised(x, name, total, tuple(dict.fromkeys(cut)))

    @torch.no_grad()
    @full_float32()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to pictures (B, H, W, 3) float32 in [0, 1], one by one."""
        vae = self.parts.vae
        device = device_of(vae)
        z = vae.unscale(latents.to(device, torch.float32)).to(param_dtype(vae))
        return torch.cat([self._picture(one) for one in z[:, None]])

    def _picture(self, z: Tensor) -> Tensor:
        vae = self.parts.vae
        return self._attempt(
            lambda: to_pixels(decode_in(vae, z, self._decoding)).cpu(), "decode", autoencoder=True
        )

    @property
    def _decoding(self) -> Decoding:
        return Decoding() if self.placement is None else self.placement.decoding

    def _attempt(
        self, work: Callable[[], _Result], what: str, *, autoencoder: bool = False
    ) -> _Result:
        if self.placement is None:
            return work()
        return self.placement.attempt(work, what, autoencoder=autoencoder)

    def _sampler(
        self,
        name: str,
        request: PictureRequest,
        shape: tuple[int, int, int, int],
        noise: NoiseSource,
    ) -> Sampler:
        strength = 1.0 if request.image is None else request.strength
        tokens = shape[2] * shape[3] // self.family.patch**2
        facts, adapt = self.parts.scheduler, self.family.schedule
        return make_sampler(
            name,
            facts if adapt is None else adapt(facts, tokens, request.steps),
            steps=request.steps,
            tokens=tokens,
            flow=self.family.flow,
            schedule=request.schedule,
            shift=request.shift,
            part=Part(strength=strength, start=request.begin, stop=request.end),
            draw=noise.draw,
            eta=request.eta,
            architecture=self.parts.architecture,
        )

    def _latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        factor, multiple = self.parts.vae.config.factor, self.multiple
        if min(width, height) < multiple or width % multiple or height % multiple:
            near = [max(1, round(size / multiple)) * multiple for size in (width, height)]
            raise UsageError(
                f"width and height must be multiples of {multiple}, found {width}x{height}, "
                f"nearest {near[0]}x{near[1]}"
            )
        return self.parts.vae.config.latents, height // factor, width // factor

    def _texts(self, request: PictureRequest, cfg: float) -> tuple[Text, Text | None]:
        """Encode the prompts and, where guidance is on, the negative one.

        Without a negative prompt the family says what stands for it; flows that say nothing are
        then not guided.
        """
        if request.negative and not needs_negative(cfg):
            raise UsageError(f"a negative prompt has no effect with cfg {cfg:g}: use cfg above 1")
        family, prompts = self.family, list(request.prompts)
        options = TextOptions(request.text_tokens, request.clip_skip, style=request.prompt_style)
        positive = family.encode(self.parts, prompts, options)
        text = request.negative
        if not needs_negative(cfg):
            return positive, None
        if self.parts.distilled:
            raise UsageError(f"this model is distilled: it runs without guidance, not cfg {cfg:g}")
        if text is None and family.nothing is not None:
            nothing = family.nothing(self.parts, positive)
            if nothing is not None:
                return positive, nothing
        elif text is None and family.flow:
            return positive, None
        options = replace(options, negative=True)
        return positive, family.encode(self.parts, [text or ""] * len(prompts), options)
