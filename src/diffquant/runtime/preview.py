"""Previews: what a run has come to, as a small picture beside the output, every few steps.

Colours of the latents cost nothing and have one pixel per latent pixel; a tiny autoencoder (TAESD
and kin), given as a file, shows a picture of full size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diffquant.convert.architectures import ARCHITECTURES
from diffquant.convert.binding import bind
from diffquant.convert.detect import detect_component
from diffquant.core.errors import UsageError
from diffquant.io import open_source
from diffquant.runtime.latent_colours import COLOURS, Colours
from diffquant.runtime.loading import build, model_for
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.models.taesd import Taesd
from diffquant.runtime.packing import packed_weights

__all__ = ["Show", "measured", "published", "shower", "tiny_decoder", "to_colours"]

# Latents (B, C, h, w) -> the first of them as a picture (H, W, 3) float32 in [0, 1].
Show = Callable[[Tensor], NDArray[np.float32]]
_ALIKE = 0.5  # correlation from which the table's colours are this VAE's
_PROBES = 24  # pictures of a fit
_RIDGE = 1e-4


def shower(architecture: str, vae: Autoencoder, tiny: Path | None) -> Show:
    """What turns latents of a model into pictures.

    Args:
        architecture: slug; says which latent space.
        vae: of the model.
        tiny: file of a tiny autoencoder, None for colours: those of the table where they are
            this VAE's, else colours measured on the VAE itself.

    Raises:
        UsageError: the file decodes other latents.
    """
    channels = vae.config.latents
    if tiny is not None:
        decoder = tiny_decoder(tiny, channels)

        def show(latents: Tensor) -> NDArray[np.float32]:
            with torch.no_grad():
                picture = decoder(latents[:1].cpu().float())[0]
            return picture.clamp(0, 1).permute(1, 2, 0).numpy()

        return show
    colours = published(architecture, vae) or measured(vae)
    return lambda latents: to_colours(latents, colours)


def tiny_decoder(path: Path, channels: int) -> Callable[[Tensor], Tensor]:
    """Read a tiny autoencoder: latents (B, C, h, w) -> pictures (B, 3, H, W), about [0, 1].

    Raises:
        UsageError: no decoder of latents with `channels` channels.
    """
    with open_source(path) as source:
        logical = bind(source)
        part = detect_component(logical.specs())
        kind = None if part is None else model_for(part.kind)
        if part is None or kind != "taesd":
            found = "an unknown file" if part is None else f"a {part.name} ({part.kind})"
            raise UsageError(f"{path}: expected a tiny autoencoder, found {found}")
        tiny = build(kind, packed_weights(logical, part), {})
    assert isinstance(tiny, Taesd)
    config = tiny.config
    if config.latents != channels or not config.decoder:
        holds = f"decodes {config.latents} channels" if config.decoder else "has no decoder"
        raise UsageError(f"{path}: expected a decoder of {channels} channels, it {holds}")
    return lambda latents: tiny.decode(tiny.unscale(latents)) / 2 + 0.5


def to_colours(latents: Tensor, colours: Colours) -> NDArray[np.float32]:
    """Show the first of (B, C, h, w) latents: (h, w, 3) in [0, 1].

    Values that are not finite become grey: a preview is no place to fail.
    """
    factors, bias = torch.tensor(colours.factors), torch.tensor(colours.bias)
    rgb = latents[0].detach().cpu().float().permute(1, 2, 0) @ factors + bias
    return torch.nan_to_num(rgb / 2 + 0.5, nan=0.5).clamp(0, 1).numpy()


def published(architecture: str, vae: Autoencoder) -> Colours | None:
    """The table's row, where this VAE sees it so: a space's name does not make a VAE its own."""
    row = COLOURS.get(ARCHITECTURES[architecture].latent.space)
    if row is None or len(row.factors) != vae.config.latents:
        return None
    latents, colours = _probe(vae, 2)
    said = latents @ torch.tensor(row.factors) + torch.tensor(row.bias)
    alike = torch.corrcoef(torch.stack((said.flatten(), colours.flatten())))[0, 1]
    return row if float(alike) > _ALIKE else None


def measured(vae: Autoencoder) -> Colours:
    """Fit colours to how a VAE encodes patches of known colour: least squares, bias included."""
    latents, colours = _probe(vae, _PROBES)
    centre, mean = latents.mean(0), colours.mean(0)
    away = latents - centre
    spread = away.T @ away
    spread += _RIDGE * spread.diagonal().mean() * torch.eye(len(spread))  # channels may repeat
    factors = torch.linalg.solve(spread, away.T @ (colours - mean))
    bias = (mean - centre @ factors).tolist()
    rows = [(red, green, blue) for red, green, blue in factors.tolist()]
    return Colours(tuple(rows), (bias[0], bias[1], bias[2]))


@torch.no_grad()
def _probe(vae: Autoencoder, count: int) -> tuple[Tensor, Tensor]:
    """Encode `count` pictures of random patches: latents (n, C), their colours (n, 3) in [-1, 1].

    A picture has 8 x 8 latents, a patch 4 x 4, so all of them together cost less than one picture
    of 512 x 512 pixels.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    patches = torch.rand((count, 3, 2, 2), generator=generator) * 2 - 1
    colours = functional.interpolate(patches, scale_factor=4.0)  # one per latent pixel
    pixels = functional.interpolate(colours, scale_factor=float(vae.config.factor))
    parameter = next(vae.parameters())
    mean, _ = vae.encode(pixels.to(parameter))
    latents = torch.nan_to_num(vae.scale(mean).float().cpu())
    flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    return flat, colours.permute(0, 2, 3, 1).reshape(-1, 3)
