"""Inpainting: where a run starts from, what a mask protects, what an inpainting model is shown.

Two kinds of models do it. Inpainting models (9 channels, Flux Fill) are shown the mask and the
picture without what is painted anew. Any other model paints everything, and after every step the
protected latents are those of the picture, noised to where the run is. The mask is cut at one half
for latents, and taken as it is where the protected pixels are put back at the end.
Source: huggingface/diffusers 0.42 pipelines/stable_diffusion/pipeline_stable_diffusion_inpaint.py,
pipelines/flux/pipeline_flux_{fill,inpaint}.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffquant.core.errors import UsageError
from diffquant.runtime.families import Family, PipelineParts
from diffquant.runtime.families.base import device_of
from diffquant.runtime.img2img import encode_picture
from diffquant.runtime.noise import NoiseSource
from diffquant.runtime.request import PictureRequest
from diffquant.runtime.samplers import Sampler
from diffquant.runtime.strips import Decoding

__all__ = ["Start", "paste", "start"]


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts, and what holds on the way.

    Attributes:
        latents: (B, C, h, w) float32, as the sampler's first call wants them.
        beside: what an inpainting denoiser is shown, else None.
        clean, noise: (B, C, h, w) of the picture and the noise it was started with, where a mask
            protects latents.
        mask: (1 or B, 1, h, w) of 0 and 1, 1 where latents are painted anew.
        ends: whether the run ends at a picture.
    """

    latents: Tensor
    beside: Tensor | None = None
    clean: Tensor | None = None
    noise: Tensor | None = None
    mask: Tensor | None = None
    ends: bool = True

    def protect(self, x: Tensor, run: Sampler, index: int) -> Tensor:
        """Put the protected latents back, noised to the level of call `index`."""
        if self.mask is None:
            return x
        assert self.clean is not None
        assert self.noise is not None
        # the level where a run ends may not be exactly 0 (DDIM): diffusers takes the picture itself
        last = self.ends and index == len(run.timesteps)
        kept = self.clean if last else run.add_noise(self.clean, self.noise, index)
        return self.mask * x + (1 - self.mask) * kept


def start(
    parts: PipelineParts,
    family: Family,
    request: PictureRequest,
    run: Sampler,
    noise: NoiseSource,
    shape: tuple[int, int, int, int],
    given: Tensor | None,
    decoding: Decoding | None = None,
) -> Start:
    """Prepare a run.

    Args:
        parts: of the model.
        family: of the model.
        request: what is wanted.
        run: the sampler, already cut to its part.
        noise: streams of the pictures; drawn from in diffusers' order.
        shape: (B, C, h, w) of the latents.
        given: noise instead of drawing it; for a run that begins part-way the latents themselves.
        decoding: how the autoencoder runs.

    Raises:
        UsageError: latents of another shape, or a mask that leaves nothing to paint.
    """
    device = device_of(parts.denoiser)
    if given is not None and tuple(given.shape) != shape:
        raise UsageError(f"latents must have shape {shape}, found {tuple(given.shape)}")
    if request.begin > 0:
        if given is None:
            raise UsageError("a run that begins part-way needs the latents of the one before")
        return Start(given.to(device, torch.float32))
    join = family.beside(parts) if family.beside and request.mask is not None else None
    clean = None
    # SD's inpainting models start from noise alone at full strength: nothing is drawn for it
    if request.image is not None and not (join and request.strength == 1 and not family.flow):
        clean = encode_picture(parts.vae, request.image, noise, shape[0], decoding).to(device)
    drawn = (noise.draw(shape) if given is None else given).to(device, torch.float32)
    if clean is None or (request.mask is not None and request.strength == 1 and not family.flow):
        latents = drawn * run.init_scale
    else:
        latents = run.add_noise(clean, drawn, 0)
    if request.mask is None:
        return Start(latents)
    assert request.image is not None
    hole = (request.mask[:, None].float() >= 0.5).float()  # (1 or B, 1, H, W)
    small = interpolate(hole, size=shape[2:]).to(device)
    if not bool((hole if join else small).any()):
        raise UsageError(
            "the mask leaves nothing to paint: it has to be 0.5 or more over at least a latent "
            f"pixel ({parts.vae.config.factor} x {parts.vae.config.factor} pixels)"
        )
    if join is None:
        return Start(latents, None, clean, drawn, small, request.end == 1)
    rest = 0.5 + (request.image.float() - 0.5) * (1 - hole.permute(0, 2, 3, 1))  # grey is 0
    masked = encode_picture(parts.vae, rest, noise, shape[0], decoding).to(device)
    return Start(latents, join(hole.expand(shape[0], -1, -1, -1).to(device), masked))


def paste(request: PictureRequest, pictures: Tensor) -> Tensor:
    """Put the pixels that the mask protects back into pictures (B, H, W, 3), if that is asked."""
    if request.mask is None or request.image is None or not request.paste:
        return pictures
    mask = request.mask[..., None].float().cpu()
    return mask * pictures + (1 - mask) * request.image.float().cpu()
