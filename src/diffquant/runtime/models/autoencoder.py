"""What every autoencoder of the runtime answers, whatever it is made of.

    pixels (B, 3, H, W) in [-1, 1]  --encode-->  mean, logvar  --scale-->    latents (B, C, h, w)
    pixels                          <--decode--  z             <--unscale--  latents

Both ways also run in strips (runtime/strips.py), which gives the same numbers in less memory.
`C` and H / h are the config's `latents` and `factor`: they count the latents that the sampling loop
holds, after `scale`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from diffquant.runtime.models.feature_map import StripPlan

__all__ = ["Autoencoder", "AutoencoderSizes", "from_pixels", "to_pixels"]


class AutoencoderSizes(Protocol):
    """What callers read from any autoencoder's config."""

    @property
    def latents(self) -> int:
        """Channels of the latents the loop holds."""
        ...

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        ...


class Autoencoder(nn.Module):
    """Base of the autoencoders; the six methods are theirs to write."""

    config: AutoencoderSizes

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures (B, 3, H, W) in [-1, 1]: mean and log variance of z."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Decode z, already unscaled: pictures (B, 3, H, W), about [-1, 1]."""
        raise NotImplementedError

    def encode_strips(self, pixels: Tensor, plan: StripPlan) -> tuple[Tensor, Tensor]:
        """Encode in strips: what `encode` returns, on the plan's device."""
        raise NotImplementedError

    def decode_strips(self, z: Tensor, plan: StripPlan) -> Tensor:
        """Decode in strips: what `decode` returns, where the plan stores maps."""
        raise NotImplementedError

    def scale(self, z: Tensor) -> Tensor:
        """Turn z of the encoder into what the denoiser works on."""
        raise NotImplementedError

    def unscale(self, latents: Tensor) -> Tensor:
        """Turn the denoiser's latents into z for the decoder."""
        raise NotImplementedError


def to_pixels(decoded: Tensor) -> Tensor:
    """Clip decoder output (B, 3, H, W) to pictures (B, H, W, 3) float32 in [0, 1]."""
    return torch.clamp(decoded.float() / 2 + 0.5, 0, 1).permute(0, 2, 3, 1).contiguous()


def from_pixels(pictures: Tensor) -> Tensor:
    """Turn pictures (B, H, W, 3) in [0, 1] into what encoders take: (B, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).contiguous() * 2 - 1
