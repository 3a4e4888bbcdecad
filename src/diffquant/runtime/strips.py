"""Decoding and encoding in strips: the picture of the whole, in a fraction of its memory.

    whole   as the model's own methods do: about three maps of the widest block at once
    strips  maps stay on the device, layers run strip by strip: two maps and a strip
    host    maps lie in host memory, strips travel: on the device are strips, keys and values of the
            middle attention, weights

Tiles that overlap and are blended, the usual way, change the picture: group norm and attention then
see a tile. Here they see the whole map (models/feature_map.py). convert/footprint/strips.py says
what each mode takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffquant.core.errors import UsageError
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.models.feature_map import StripPlan

__all__ = ["Decoding", "Mode", "decode_in", "encode_in"]

Mode: TypeAlias = Literal["whole", "strips", "host"]


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an autoencoder runs.

    Attributes:
        mode: see above.
        rows: of a strip, in rows of the latents; 0: chosen layer by layer, so that a strip stays
            within convert/footprint/reach.py's STRIP_NBYTES.
    """

    mode: Mode = "whole"
    rows: int = 0

    def __post_init__(self) -> None:
        """Refuse strips of less than nothing."""
        if self.rows < 0:
            raise UsageError(f"strips of {self.rows} rows: expected 1 or more, or 0 to choose")

    def plan(self, device: torch.device, latent_rows: int) -> StripPlan:
        """The plan of one run."""
        return StripPlan(device, self.mode == "host", self.rows, latent_rows)


@torch.no_grad()
def decode_in(vae: Autoencoder, z: Tensor, decoding: Decoding) -> Tensor:
    """Decode z (B, C, h, w), already unscaled, on the autoencoder's device: (B, 3, H, W).

    With mode "host" the picture is on the CPU, else where z is.
    """
    if decoding.mode == "whole":
        return vae.decode(z)
    return vae.decode_strips(z, decoding.plan(z.device, z.shape[2]))


@torch.no_grad()
def encode_in(vae: Autoencoder, pixels: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """Encode pictures (B, 3, H, W) in [-1, 1]: mean and log variance of z, on the model's device.

    With mode "host" the pixels may lie on the CPU; they need not fit the device.
    """
    device = next(vae.parameters()).device
    if decoding.mode != "host":
        pixels = pixels.to(device)
    if decoding.mode == "whole":
        return vae.encode(pixels)
    rows = max(1, pixels.shape[2] // vae.config.factor)
    return vae.encode_strips(pixels, decoding.plan(device, rows))
