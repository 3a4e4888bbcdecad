"""Flux.2's autoencoder: the KL autoencoder, its latents folded and whitened.

Encoder and decoder are Flux.1's with 32 channels at an eighth of the picture's size. What the
denoiser works on is 2x2 of their pixels in one (128 channels at a sixteenth), each channel less
its mean over the training set, divided by its deviation: a batch norm whose statistics are stored.
The quantizing convolutions lie inside encoder and decoder.
Source: black-forest-labs/flux2 src/flux2/autoencoder.py; the fold's channel order and the eps:
huggingface/diffusers@58eb52c:src/diffusers/pipelines/flux2/pipeline_flux2_klein.py,
_patchify_latents, and models/autoencoders/autoencoder_kl_flux2.py, batch_norm_eps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import UnsupportedShape
from diffquant.runtime.layers import QuantConv2d
from diffquant.runtime.models import vae_kl
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.models.facts import Hyper, Shapes, number, require, shape_of
from diffquant.runtime.models.feature_map import StripPlan

__all__ = ["AutoencoderFlux2", "VaeFlux2Config", "config_from"]

_PATCH = 2
_QUANT = {
    "encoder.quant_conv.weight": "quant_conv.weight",
    "decoder.post_quant_conv.weight": "post_quant_conv.weight",
}


@dataclass(frozen=True, slots=True)
class VaeFlux2Config:
    """Sizes of the autoencoder.

    Attributes:
        kl: of encoder and decoder.
        latents: channels the loop holds.
        factor: pixels per latent of the loop, along each side.
        eps: added to the stored variances.
    """

    kl: vae_kl.VaeConfig
    latents: int
    factor: int
    eps: float


def config_from(shapes: Shapes, hyper: Hyper) -> VaeFlux2Config:
    """Read sizes from keys; hyper: norm_num_groups, batch_norm_eps.

    Raises:
        UnsupportedShape: the statistics are not of 2x2 latent pixels.
    """
    require(hyper, "patch_size", ((_PATCH, _PATCH), [_PATCH, _PATCH]))
    kl = vae_kl.config_from({_QUANT.get(key, key): shape for key, shape in shapes.items()}, hyper)
    (latents,) = shape_of(shapes, "bn.running_mean")
    if latents != kl.latents * _PATCH**2:
        raise UnsupportedShape(
            f"bn.running_mean: expected {kl.latents * _PATCH**2} channels, found {latents}"
        )
    return VaeFlux2Config(
        kl=kl,
        latents=latents,
        factor=kl.factor * _PATCH,
        eps=number(hyper, "batch_norm_eps", 1e-4),
    )


class _Encoder(vae_kl.Encoder):
    def __init__(self, config: vae_kl.VaeConfig) -> None:
        super().__init__(config)
        moments = config.moments
        self.quant_conv = QuantConv2d(moments, moments, 1) if config.quant_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.quant_conv(super().forward(x))
        return out

    def strips(self, pixels: Tensor, plan: StripPlan) -> Tensor:
        out: Tensor = self.quant_conv(super().strips(pixels, plan))
        return out


class _Decoder(vae_kl.Decoder):
    def __init__(self, config: vae_kl.VaeConfig) -> None:
        super().__init__(config)
        latents, there = config.latents, config.post_quant_conv
        self.post_quant_conv = QuantConv2d(latents, latents, 1) if there else nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(self.post_quant_conv(z))

    def strips(self, z: Tensor, plan: StripPlan) -> Tensor:
        return super().strips(self.post_quant_conv(z), plan)


class _Statistics(nn.Module):
    """Means and variances of the folded latents, channel by channel."""

    def __init__(self, config: VaeFlux2Config) -> None:
        super().__init__()
        self.running_mean = nn.Parameter(torch.empty(config.latents), requires_grad=False)
        self.running_var = nn.Parameter(torch.empty(config.latents), requires_grad=False)


def _posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = moments.chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    return functional.pixel_unshuffle(mean, _PATCH), functional.pixel_unshuffle(logvar, _PATCH)


class AutoencoderFlux2(Autoencoder):
    """Encoder, decoder, or both, as the file has them, and the statistics of the latents."""

    def __init__(self, config: VaeFlux2Config) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config: VaeFlux2Config = config
        self.encoder = _Encoder(config.kl) if config.kl.encoder else None
        self.decoder = _Decoder(config.kl) if config.kl.decoder else None
        self.bn = _Statistics(config)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures (B, 3, H, W) in [-1, 1]: mean and log variance, (B, C, H/16, W/16)."""
        assert self.encoder is not None, "this file holds no encoder"
        return _posterior(self.encoder(pixels))

    def encode_strips(self, pixels: Tensor, plan: StripPlan) -> tuple[Tensor, Tensor]:
        """Encode in strips."""
        assert self.encoder is not None, "this file holds no encoder"
        return _posterior(self.encoder.strips(pixels, plan))

    def decode(self, z: Tensor) -> Tensor:
        """Decode z (B, C, h, w), already unscaled: pictures (B, 3, 16 h, 16 w), about [-1, 1]."""
        assert self.decoder is not None, "this file holds no decoder"
        out: Tensor = self.decoder(functional.pixel_shuffle(z, _PATCH))
        return out

    def decode_strips(self, z: Tensor, plan: StripPlan) -> Tensor:
        """Decode in strips."""
        assert self.decoder is not None, "this file holds no decoder"
        return self.decoder.strips(functional.pixel_shuffle(z, _PATCH), plan)

    def scale(self, z: Tensor) -> Tensor:
        """Turn z of the encoder into what the denoiser works on."""
        mean, deviation = self._statistics(z)
        return (z - mean) / deviation

    def unscale(self, latents: Tensor) -> Tensor:
        """Turn the denoiser's latents into z for the decoder."""
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.bn.running_mean.to(like)
        deviation = torch.sqrt(self.bn.running_var.to(like) + self.config.eps)
        return mean[:, None, None], deviation[:, None, None]
