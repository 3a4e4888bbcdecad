"""A denoiser with no text encoder or VAE anywhere: stated random conditioning, latents as colours.

What a denoiser does with numbers can be compared without knowing what they mean. So the text is
Gaussian noise of the shapes that the denoiser's own weights ask for, seeded by the prompt, and the
picture is a linear preview of the latents, one pixel per latent pixel. Two files get the same
noise: what differs between their previews is the files' doing. It says nothing about pictures that
people see.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.architectures.spaces import SPACES
from diffquant.core.errors import ArchitectureError
from diffquant.runtime.families import FAMILIES, PipelineParts, Text, TextOptions
from diffquant.runtime.families.base import device_of
from diffquant.runtime.latent_colours import COLOURS
from diffquant.runtime.layers import PackedLayer
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.pipeline import Pipeline
from diffquant.runtime.schedules import SchedulerFacts

__all__ = ["LatentPreview", "describe", "synthetic_pipeline"]

_TOKENS = 32
_SEED = 0  # of colours, where none are published
_WAVE = 256  # sinusoids of one number in SDXL's vector, where it is that wide


@dataclass(frozen=True, slots=True)
class _Row:
    """What an architecture's denoiser asks for, read off the module.

    Attributes:
        latents: channels of what is denoised.
        states: width of the text states.
        pooled: width of the pooled text, None where there is none.
        joined: latent pixels of the space that one latent pixel of the loop joins along a side.
    """

    latents: Callable[[Any], int]
    states: Callable[[Any], int]
    pooled: Callable[[Any], int] | None = None
    joined: int = 1


def _context(unet: nn.Module) -> int:
    """Width of the states that a UNet's cross attention reads."""
    for name, layer in unet.named_modules():
        if name.endswith("attn2.to_k") and isinstance(layer, PackedLayer):
            assert layer.packed is not None
            return int(layer.packed.shape[1])
    raise ArchitectureError("this UNet reads no text: it cannot be judged on synthetic text")


def _pooled(numbers: int) -> Callable[[Any], int]:
    """Width that a UNet's extra vector leaves to pooled text beside sinusoids of `numbers`."""

    def width(unet: Any) -> int:  # noqa: ANN401 - UNet
        label = int(unet.config.label or 0)
        wave = _WAVE
        while wave > 1 and label <= numbers * wave:
            wave //= 2
        return label - numbers * wave

    return width


_UNET = _Row(lambda unet: int(unet.config.out_channels), _context)
_ROWS: Mapping[str, _Row] = {
    "sd15": _UNET,
    "sd2": _UNET,
    "sdxl": replace(_UNET, pooled=_pooled(6)),
    "sdxl_refiner": replace(_UNET, pooled=_pooled(5)),
    "flux1": _Row(
        lambda flux: int(flux.config.out_channels) // 4,
        lambda flux: int(flux.config.context),
        lambda flux: int(flux.config.vector),
    ),
    "flux2": _Row(
        lambda flux: int(flux.config.out_channels), lambda flux: int(flux.config.context), joined=2
    ),
    "qwen_image": _Row(
        lambda model: int(model.config.out_channels) // 4, lambda model: int(model.config.context)
    ),
    "z_image": _Row(
        lambda model: int(model.config.in_channels), lambda model: int(model.config.caption)
    ),
}


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What callers read from an autoencoder's config."""

    latents: int
    factor: int


class LatentPreview(Autoencoder):
    """Stands for a VAE: colours of latents, linear, one pixel per latent pixel."""

    def __init__(self, space: str, channels: int, factor: int) -> None:
        """Take the space's published colours, or fixed random directions where there are none."""
        super().__init__()
        self.config = _Sizes(channels, factor)
        row = COLOURS.get(space)
        self.published = row is not None and len(row.factors) == channels
        if row is not None and self.published:
            factors, bias = torch.tensor(row.factors), torch.tensor(row.bias)
        else:
            generator = torch.Generator("cpu").manual_seed(_SEED)
            factors = torch.randn((channels, 3), generator=generator) / channels**0.5 / 2
            bias = torch.zeros(3)
        self.factors = nn.Parameter(factors, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def decode(self, z: Tensor) -> Tensor:
        """Colours (B, 3, h, w), about [-1, 1]."""
        return torch.einsum("bchw,cr->brhw", z, self.factors) + self.bias[:, None, None]

    def scale(self, z: Tensor) -> Tensor:
        """As it is."""
        return z

    def unscale(self, latents: Tensor) -> Tensor:
        """As it is."""
        return latents


def synthetic_pipeline(
    architecture: str, denoiser: nn.Module, scheduler: SchedulerFacts
) -> Pipeline:
    """A pipeline around a denoiser alone.

    Raises:
        ArchitectureError: a denoiser whose text has no shape that could be stated.
    """
    row = _ROWS[architecture]
    latent = ARCHITECTURES[architecture].latent
    factor = SPACES[latent.space].downscale if latent.space in SPACES else 8
    preview = LatentPreview(latent.space, row.latents(denoiser), factor * row.joined)
    parts = PipelineParts(
        architecture, denoiser, preview.to(device_of(denoiser)), (), (), scheduler
    )
    pipeline = Pipeline(parts)
    pipeline.family = replace(FAMILIES[architecture], encode=_encode, nothing=None)
    return pipeline


def _encode(parts: PipelineParts, prompts: Sequence[str], options: TextOptions) -> Text:
    """Gaussian states and pooled text, the same for the same prompt whatever the file."""
    row = _ROWS[parts.architecture]
    width = row.states(parts.denoiser)
    pooled = None if row.pooled is None else row.pooled(parts.denoiser)
    found = [_numbers(prompt, width, pooled or 0) for prompt in prompts]
    return Text(
        torch.stack([states for states, _ in found]),
        None if pooled is None else torch.stack([vector for _, vector in found]),
        negative=options.negative,
    )


def _numbers(prompt: str, width: int, pooled: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(prompt.encode("utf-8", "replace")))
    states = torch.randn((_TOKENS, width), generator=generator)
    return states, torch.randn((pooled,), generator=generator)


def describe(pipeline: Pipeline) -> str:
    """What stood for text encoder and VAE, for reports."""
    parts = pipeline.parts
    row = _ROWS[parts.architecture]
    text = f"{_TOKENS} x {row.states(parts.denoiser)} text states"
    if row.pooled is not None:
        text += f" and {row.pooled(parts.denoiser)} pooled"
    assert isinstance(parts.vae, LatentPreview)
    colours = "its published colours" if parts.vae.published else "three fixed random directions"
    return (
        f"synthetic: {text} of Gaussian numbers seeded by the prompt's CRC-32; latents of "
        f"{parts.vae.config.latents} channels shown by {colours}, one pixel per latent pixel"
    )
