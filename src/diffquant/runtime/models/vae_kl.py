"""The KL autoencoder of Stable Diffusion and Flux.

Pictures are (B, 3, H, W) in [-1, 1], latents an eighth of that along each side. Names are CompVis'.
SD: 4 latent channels, quant_conv and post_quant_conv; Flux: 16, without them. The four projections
of the middle attention are stored as 1x1 convolutions or as matrices: the same numbers.
`strips` beside `forward` is the same layer, over a map in strips (feature_map.py).
Source: CompVis/stable-diffusion ldm/modules/diffusionmodules/model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from diffquant.runtime.layers import QuantConv2d, QuantLinear
from diffquant.runtime.models.attention import attention
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.models.facts import Hyper, Shapes, count, number, require, shape_of
from diffquant.runtime.models.feature_map import CONV, DOUBLE, HALVE, SILU, FeatureMap, StripPlan

__all__ = ["AutoencoderKL", "Decoder", "Encoder", "VaeConfig", "VaeLevel", "config_from"]

# Modules that have `strips`; nn.ModuleList forgets of which class.
_Layers: TypeAlias = Iterator[Any]


@dataclass(frozen=True, slots=True)
class VaeLevel:
    """One resolution: (in, out) channels of its residual blocks, and whether it then resamples."""

    blocks: tuple[tuple[int, int], ...]
    resamples: bool


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """Sizes of an autoencoder.

    Attributes:
        encoder, decoder: levels, finest first; empty where the file holds only the other half.
        encoder_attention, decoder_attention: whether the middle attends.
        moments: channels of the encoder's output (mean and log variance), after quant_conv if any.
        scaling_factor, shift_factor: model latents = (z - shift_factor) * scaling_factor.
    """

    encoder: tuple[VaeLevel, ...]
    decoder: tuple[VaeLevel, ...]
    encoder_attention: bool
    decoder_attention: bool
    pixels: int
    latents: int
    moments: int
    quant_conv: bool
    post_quant_conv: bool
    groups: int
    eps: float
    scaling_factor: float
    shift_factor: float

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        levels = self.decoder or self.encoder
        return 1 << sum(level.resamples for level in levels)


def _levels(shapes: Shapes, prefix: str, resample: str) -> tuple[VaeLevel, ...]:
    levels = []
    for i in range(count(shapes, prefix)):
        blocks = []
        for j in range(count(shapes, f"{prefix}.{i}.block")):
            rows, columns, *_ = shape_of(shapes, f"{prefix}.{i}.block.{j}.conv1.weight")
            blocks.append((columns, rows))
        levels.append(VaeLevel(tuple(blocks), f"{prefix}.{i}.{resample}.conv.weight" in shapes))
    return tuple(levels)


def config_from(shapes: Shapes, hyper: Hyper) -> VaeConfig:
    """Read sizes from keys; hyper: norm_num_groups, scaling_factor, shift_factor.

    Defaults of the factors: SD1.5's with 4 latent channels, Flux's with 16.
    """
    require(hyper, "act_fn", ("silu", "swish"))
    encoder = _levels(shapes, "encoder.down", "downsample")
    decoder = _levels(shapes, "decoder.up", "upsample")
    moments = shapes["encoder.conv_out.weight"][0] if encoder else 0
    latents = shapes["decoder.conv_in.weight"][1] if decoder else moments // 2
    pixels = shape_of(shapes, "decoder.conv_out.weight" if decoder else "encoder.conv_in.weight")
    scale, shift = (0.3611, 0.1159) if latents == 16 else (0.18215, 0.0)
    return VaeConfig(
        encoder=encoder,
        decoder=decoder,
        encoder_attention="encoder.mid.attn_1.q.weight" in shapes,
        decoder_attention="decoder.mid.attn_1.q.weight" in shapes,
        pixels=pixels[0] if decoder else pixels[1],
        latents=latents,
        moments=moments,
        quant_conv="quant_conv.weight" in shapes,
        post_quant_conv="post_quant_conv.weight" in shapes,
        groups=int(number(hyper, "norm_num_groups", 32)),
        eps=1e-6,
        scaling_factor=number(hyper, "scaling_factor", scale),
        shift_factor=number(hyper, "shift_factor", shift),
    )


class _Resnet(nn.Module):
    def __init__(self, channels: tuple[int, int], config: VaeConfig) -> None:
        super().__init__()
        before, after = channels
        self.norm1 = nn.GroupNorm(config.groups, before, eps=config.eps)
        self.conv1 = QuantConv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.groups, after, eps=config.eps)
        self.conv2 = QuantConv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = QuantConv2d(before, after, 1)
        self.shortcut = before != after
        self.channels = after

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        out: Tensor = self._skip(x) + h
        return out

    def strips(self, x: FeatureMap) -> FeatureMap:
        norm1 = x.group_norm(self.norm1, SILU)
        h = x.map(lambda strip: self.conv1(norm1(strip)), self.channels, CONV, measured=True)
        norm2 = h.group_norm(self.norm2, SILU)
        return h.map(
            lambda strip, skip: self.conv2(norm2(strip)) + self._skip(skip),
            self.channels,
            CONV,
            beside=x,
            inplace=True,
            measured=True,
        )

    def _skip(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x) if self.shortcut else x


class _Attention(nn.Module):
    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=config.eps)
        self.q = QuantLinear(channels, channels)
        self.k = QuantLinear(channels, channels)
        self.v = QuantLinear(channels, channels)
        self.proj_out = QuantLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = _tokens(self.norm(x))
        return self._attend(x, tokens, self.k(tokens), self.v(tokens))

    def strips(self, x: FeatureMap) -> FeatureMap:
        norm, channels = x.group_norm(self.norm), len(self.norm.weight)
        k = x.tokens(lambda strip: self.k(_tokens(norm(strip))), channels)
        v = x.tokens(lambda strip: self.v(_tokens(norm(strip))), channels)
        return x.map(
            lambda strip: self._attend(strip, _tokens(norm(strip)), k, v),
            channels,
            inplace=True,
            measured=True,
        )

    def _attend(self, x: Tensor, tokens: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Add to x (B, C, rows, W) what its tokens, normed, find among all keys; one head."""
        y = attention(self.q(tokens)[:, None], k[:, None], v[:, None])[:, 0]
        out: Tensor = x + self.proj_out(y).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W, C)."""
    return x.flatten(2).mT.contiguous()


class _Resample(nn.Module):
    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up, self.channels = up, channels
        self.conv = QuantConv2d(
            channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        else:  # one row and column of zeros on the far sides only, as it was trained
            x = functional.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out

    def strips(self, x: FeatureMap) -> FeatureMap:
        return x.map(self, self.channels, DOUBLE if self.up else HALVE, measured=True)


class _Middle(nn.Module):
    def __init__(self, channels: int, config: VaeConfig, *, attention: bool) -> None:
        super().__init__()
        self.block_1 = _Resnet((channels, channels), config)
        self.attn_1 = _Attention(channels, config) if attention else None
        self.block_2 = _Resnet((channels, channels), config)

    def layers(self) -> _Layers:
        attention = () if self.attn_1 is None else (self.attn_1,)
        yield from (self.block_1, *attention, self.block_2)


class _Level(nn.Module):
    def __init__(self, level: VaeLevel, config: VaeConfig, *, up: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Resnet(channels, config) for channels in level.blocks)
        resample = _Resample(level.blocks[-1][1], up=up) if level.resamples else None
        self.upsample = resample if up else None
        self.downsample = None if up else resample

    def layers(self) -> _Layers:
        resample = self.upsample or self.downsample
        yield from (*self.block, *(() if resample is None else (resample,)))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to moments (B, moments, h, w), before quant_conv."""

    def __init__(self, config: VaeConfig) -> None:
        """Build the levels, finest first."""
        super().__init__()
        deep = config.encoder[-1].blocks[-1][1]
        self.conv_in = QuantConv2d(config.pixels, config.encoder[0].blocks[0][0], 3, padding=1)
        self.down = nn.ModuleList(_Level(level, config, up=False) for level in config.encoder)
        self.mid = _Middle(deep, config, attention=config.encoder_attention)
        self.norm_out = nn.GroupNorm(config.groups, deep, eps=config.eps)
        self.conv_out = QuantConv2d(deep, config.moments, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode."""
        x = self.conv_in(x)
        for layer in self._layers():
            x = layer(x)
        out: Tensor = self.conv_out(functional.silu(self.norm_out(x)))
        return out

    def strips(self, pixels: Tensor, plan: StripPlan) -> Tensor:
        """Encode in strips."""
        x = _conv_in(self.conv_in, FeatureMap.of(pixels, plan))
        for layer in self._layers():
            x = layer.strips(x)
        return _conv_out(self.norm_out, self.conv_out, x).whole()

    def _layers(self) -> _Layers:
        levels: _Layers = iter((*self.down, self.mid))
        for level in levels:
            yield from level.layers()


class Decoder(nn.Module):
    """Latents (B, latents, h, w), after post_quant_conv, to pictures (B, 3, H, W)."""

    def __init__(self, config: VaeConfig) -> None:
        """Build the levels, numbered from the finest and run from the coarsest."""
        super().__init__()
        deep, fine = config.decoder[-1].blocks[0][0], config.decoder[0].blocks[-1][1]
        self.conv_in = QuantConv2d(config.latents, deep, 3, padding=1)
        self.mid = _Middle(deep, config, attention=config.decoder_attention)
        self.up = nn.ModuleList(_Level(level, config, up=True) for level in config.decoder)
        self.norm_out = nn.GroupNorm(config.groups, fine, eps=config.eps)
        self.conv_out = QuantConv2d(fine, config.pixels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode."""
        x = self.conv_in(z)
        for layer in self._layers():
            x = layer(x)
        out: Tensor = self.conv_out(functional.silu(self.norm_out(x)))
        return out

    def strips(self, z: Tensor, plan: StripPlan) -> Tensor:
        """Decode in strips."""
        x = _conv_in(self.conv_in, FeatureMap.of(z, plan))
        for layer in self._layers():
            x = layer.strips(x)
        return _conv_out(self.norm_out, self.conv_out, x).data

    def _layers(self) -> _Layers:
        levels: _Layers = iter((self.mid, *reversed(self.up)))
        for level in levels:
            yield from level.layers()


def _conv_in(conv: QuantConv2d, x: FeatureMap) -> FeatureMap:
    return x.map(conv, conv.logical_shape[0], CONV, measured=True)


def _conv_out(norm: nn.GroupNorm, conv: QuantConv2d, x: FeatureMap) -> FeatureMap:
    normed = x.group_norm(norm, SILU)
    return x.map(lambda strip: conv(normed(strip)), conv.logical_shape[0], CONV)


class AutoencoderKL(Autoencoder):
    """Encoder, decoder, or both, as the file has them."""

    def __init__(self, config: VaeConfig) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config: VaeConfig = config
        self.encoder = Encoder(config) if config.encoder else None
        self.decoder = Decoder(config) if config.decoder else None
        moments = config.moments
        self.quant_conv = QuantConv2d(moments, moments, 1) if config.quant_conv else None
        latents = config.latents
        self.post_quant_conv = QuantConv2d(latents, latents, 1) if config.post_quant_conv else None

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures (B, 3, H, W) in [-1, 1]: mean and log variance, (B, C, h, w) each."""
        assert self.encoder is not None, "this file holds no encoder"
        return self._posterior(self.encoder(pixels))

    def encode_strips(self, pixels: Tensor, plan: StripPlan) -> tuple[Tensor, Tensor]:
        """Encode in strips."""
        assert self.encoder is not None, "this file holds no encoder"
        return self._posterior(self.encoder.strips(pixels, plan))

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if self.quant_conv is None else self.quant_conv(x)
        mean, logvar = x.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Decode z (B, C, h, w), already unscaled: pictures (B, 3, 8 h, 8 w), about [-1, 1]."""
        assert self.decoder is not None, "this file holds no decoder"
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        out: Tensor = self.decoder(z)
        return out

    def decode_strips(self, z: Tensor, plan: StripPlan) -> Tensor:
        """Decode in strips."""
        assert self.decoder is not None, "this file holds no decoder"
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder.strips(z, plan)

    def scale(self, z: Tensor) -> Tensor:
        """Turn z of the encoder into what the denoiser works on."""
        return (z - self.config.shift_factor) * self.config.scaling_factor

    def unscale(self, latents: Tensor) -> Tensor:
        """Turn the denoiser's latents into z for the decoder."""
        return latents / self.config.scaling_factor + self.config.shift_factor
