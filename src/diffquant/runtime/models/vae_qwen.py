"""The autoencoder of Qwen-Image and Wan 2.1, for single pictures.

It was made for videos: its convolutions run over (frames, rows, columns), and each sees only frames
up to its own, with zeros before the first. A picture is a first frame, so all but the last slice in
time of every kernel meets zeros: a 2-D convolution with that slice gives the same numbers at a
third of the work. The layers that double or halve the frame rate (`time_conv`) leave a first frame
alone; they are not loaded.

Pictures are (B, 3, H, W) in [-1, 1]; latents are normed channel by channel. Names are Diffusers'.
Source: huggingface/diffusers@58eb52c:src/diffusers/models/autoencoders/
autoencoder_kl_qwenimage.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.convert.architectures.vae_qwen import DEFAULTS
from diffquant.core.errors import ArchitectureError
from diffquant.runtime.layers import PackedLayer, QuantConv2d, QuantLinear
from diffquant.runtime.models.attention import attention
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.models.facts import Hyper, Shapes, count, require, shape_of
from diffquant.runtime.models.feature_map import CONV, DOUBLE, HALVE, FeatureMap, StripPlan

__all__ = ["QwenVae", "QwenVaeConfig", "VaeLayer", "config_from"]

# Modules that have `strips`; nn.ModuleList forgets of which class.
_Layers: TypeAlias = Iterator[Any]


@dataclass(frozen=True, slots=True)
class VaeLayer:
    """A residual block, or where `resamples` a change of size by two; channels in and out."""

    before: int
    after: int
    resamples: bool = False


@dataclass(frozen=True, slots=True)
class QwenVaeConfig:
    """Sizes of the autoencoder.

    Attributes:
        encoder: its layers, finest first; a flat list in the files too.
        decoder: its levels, coarsest first.
        latents: channels of the latents.
        mean, std: statistics of each channel of z, (latents,).
    """

    encoder: tuple[VaeLayer, ...]
    decoder: tuple[tuple[VaeLayer, ...], ...]
    pixels: int
    latents: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 1 << sum(layer.resamples for level in self.decoder for layer in level)


def _layer(shapes: Shapes, name: str) -> VaeLayer:
    """What the layer at `name` is, by its keys."""
    resamples = f"{name}.resample.1.weight" in shapes
    kernel = shape_of(shapes, f"{name}.{'resample.1' if resamples else 'conv1'}.weight")
    return VaeLayer(kernel[1], kernel[0], resamples)


def _level(shapes: Shapes, name: str) -> tuple[VaeLayer, ...]:
    return tuple(
        _layer(shapes, f"{name}.{kind}.{index}")
        for kind in ("resnets", "upsamplers")
        for index in range(count(shapes, f"{name}.{kind}"))
    )


def _statistics(hyper: Hyper, field: str, latents: int) -> tuple[float, ...]:
    stated = hyper.get(field) or DEFAULTS[field]
    if not isinstance(stated, Sequence) or len(stated) != latents:
        wanted = f"one number for each of {latents} latent channels"
        raise ArchitectureError(f"config field {field} is {stated!r}, expected {wanted}")
    return tuple(float(value) for value in stated)


def config_from(shapes: Shapes, hyper: Hyper) -> QwenVaeConfig:
    """Read sizes from keys; hyper: latents_mean, latents_std.

    Raises:
        ArchitectureError: statistics for another number of channels, or a standard deviation of
            zero or less.
    """
    require(hyper, "attn_scales", ((), []))
    require(hyper, "is_residual", (False,))
    latents = shape_of(shapes, "decoder.conv_in.weight")[1]
    std = _statistics(hyper, "latents_std", latents)
    if not min(std) > 0:
        raise ArchitectureError(f"config field latents_std must be positive, found {min(std)}")
    blocks = range(count(shapes, "encoder.down_blocks"))
    levels = range(count(shapes, "decoder.up_blocks"))
    return QwenVaeConfig(
        encoder=tuple(_layer(shapes, f"encoder.down_blocks.{index}") for index in blocks),
        decoder=tuple(_level(shapes, f"decoder.up_blocks.{index}") for index in levels),
        pixels=shape_of(shapes, "decoder.conv_out.weight")[0],
        latents=latents,
        mean=_statistics(hyper, "latents_mean", latents),
        std=std,
    )


class _FrameConv(PackedLayer):
    """A causal 3-D convolution, as a first frame meets it.

    The kernel (out, in, kt, k, k) stays packed whole, for block formats cannot be cut along the
    inside of a row; its last slice in time is taken after decoding.
    """

    def __init__(self, before: int, after: int, kernel: int) -> None:
        """Declare the layer; kernels are cubes, padded to keep the size."""
        super().__init__((after, before, kernel, kernel, kernel), bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in, H, W) to (B, out, H, W) in the dtype of `x`."""
        kernel = self.weight(x.dtype)[:, :, -1]
        return functional.conv2d(x, kernel, self.bias, padding=kernel.shape[-1] // 2)


class _Norm(nn.Module):
    """RMS norm over channels; `axes` trailing ones are part of the stored shape."""

    def __init__(self, width: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        normed = functional.normalize(x.float(), dim=1).to(x.dtype)
        out: Tensor = normed * width**0.5 * self.gamma.reshape(width, 1, 1)
        return out


class _Resnet(nn.Module):
    def __init__(self, layer: VaeLayer) -> None:
        super().__init__()
        self.norm1 = _Norm(layer.before, 3)
        self.conv1 = _FrameConv(layer.before, layer.after, 3)
        self.norm2 = _Norm(layer.after, 3)
        self.conv2 = _FrameConv(layer.after, layer.after, 3)
        changes = layer.before != layer.after
        self.conv_shortcut = _FrameConv(layer.before, layer.after, 1) if changes else None
        self.channels = layer.after

    def forward(self, x: Tensor) -> Tensor:
        return self._second(self._first(x), x)

    def strips(self, x: FeatureMap) -> FeatureMap:
        h = x.map(self._first, self.channels, CONV)
        return h.map(self._second, self.channels, CONV, beside=x, inplace=True)

    def _first(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv1(functional.silu(self.norm1(x)))
        return out

    def _second(self, h: Tensor, x: Tensor) -> Tensor:
        h = self.conv2(functional.silu(self.norm2(h)))
        out: Tensor = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class _Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.norm = _Norm(width, 2)
        self.to_qkv = QuantLinear(width, 3 * width)
        self.proj = QuantLinear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self._attend(x, *self._qkv(x).chunk(3, dim=-1))

    def strips(self, x: FeatureMap) -> FeatureMap:
        width = self.width
        keys_values = x.tokens(lambda strip: self._qkv(strip)[..., width:], 2 * width)
        k, v = keys_values.chunk(2, dim=-1)
        return x.map(
            lambda strip: self._attend(strip, self._qkv(strip)[..., :width].contiguous(), k, v),
            width,
            inplace=True,
        )

    def _qkv(self, x: Tensor) -> Tensor:
        out: Tensor = self.to_qkv(self.norm(x).flatten(2).mT.contiguous())  # (B, H W, 3 C)
        return out

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out: Tensor = x + self.proj(y).transpose(1, 2).unflatten(2, x.shape[2:])
        return out


class _Down(nn.Module):
    def __init__(self, layer: VaeLayer) -> None:
        super().__init__()
        # Index 0 pads one row and column on the far sides.
        conv = QuantConv2d(layer.before, layer.after, 3, stride=2)
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)
        self.channels = layer.after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resample(x)
        return out

    def strips(self, x: FeatureMap) -> FeatureMap:
        return x.map(self, self.channels, HALVE)


class _Up(nn.Module):
    def __init__(self, layer: VaeLayer) -> None:
        super().__init__()
        conv = QuantConv2d(layer.before, layer.after, 3, padding=1)
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), conv)
        self.channels = layer.after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resample(x)
        return out

    def strips(self, x: FeatureMap) -> FeatureMap:
        return x.map(self, self.channels, DOUBLE)


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(VaeLayer(width, width)) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(width)])

    def layers(self) -> _Layers:
        yield from (self.resnets[0], self.attentions[0], self.resnets[1])


class _Level(nn.Module):
    def __init__(self, layers: tuple[VaeLayer, ...]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Resnet(layer) for layer in layers if not layer.resamples)
        self.upsamplers = nn.ModuleList(_Up(layer) for layer in layers if layer.resamples)

    def layers(self) -> _Layers:
        yield from (*self.resnets, *self.upsamplers)


class _Encoder(nn.Module):
    def __init__(self, config: QwenVaeConfig) -> None:
        super().__init__()
        deep = config.encoder[-1].after
        self.conv_in = _FrameConv(config.pixels, config.encoder[0].before, 3)
        self.down_blocks = nn.ModuleList(
            _Down(layer) if layer.resamples else _Resnet(layer) for layer in config.encoder
        )
        self.mid_block = _Middle(deep)
        self.norm_out = _Norm(deep, 3)
        self.conv_out = _FrameConv(deep, 2 * config.latents, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in self._layers():
            x = layer(x)
        return self._out(x)

    def strips(self, pixels: Tensor, plan: StripPlan) -> Tensor:
        x = FeatureMap.of(pixels, plan).map(self.conv_in, self.conv_in.logical_shape[0], CONV)
        for layer in self._layers():
            x = layer.strips(x)
        return x.map(self._out, self.conv_out.logical_shape[0], CONV).whole()

    def _layers(self) -> _Layers:
        yield from (*self.down_blocks, *self.mid_block.layers())

    def _out(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(functional.silu(self.norm_out(x)))
        return out


class _Decoder(nn.Module):
    def __init__(self, config: QwenVaeConfig) -> None:
        super().__init__()
        deep, fine = config.decoder[0][0].before, config.decoder[-1][-1].after
        self.conv_in = _FrameConv(config.latents, deep, 3)
        self.mid_block = _Middle(deep)
        self.up_blocks = nn.ModuleList(_Level(level) for level in config.decoder)
        self.norm_out = _Norm(fine, 3)
        self.conv_out = _FrameConv(fine, config.pixels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for layer in self._layers():
            x = layer(x)
        return self._out(x)

    def strips(self, z: Tensor, plan: StripPlan) -> Tensor:
        x = FeatureMap.of(z, plan).map(self.conv_in, self.conv_in.logical_shape[0], CONV)
        for layer in self._layers():
            x = layer.strips(x)
        return x.map(self._out, self.conv_out.logical_shape[0], CONV).data

    def _layers(self) -> _Layers:
        levels: _Layers = iter((self.mid_block, *self.up_blocks))
        for level in levels:
            yield from level.layers()

    def _out(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(functional.silu(self.norm_out(x)))
        return out


class QwenVae(Autoencoder):
    """Encoder and decoder."""

    config: QwenVaeConfig

    def __init__(self, config: QwenVaeConfig) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quant_conv = _FrameConv(2 * config.latents, 2 * config.latents, 1)
        self.post_quant_conv = _FrameConv(config.latents, config.latents, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures (B, 3, H, W) in [-1, 1]: mean and log variance, (B, C, h, w) each."""
        return self._posterior(self.encoder(pixels))

    def encode_strips(self, pixels: Tensor, plan: StripPlan) -> tuple[Tensor, Tensor]:
        """Encode in strips."""
        return self._posterior(self.encoder.strips(pixels, plan))

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.quant_conv(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Decode z (B, C, h, w), already unscaled: pictures (B, 3, H, W), about [-1, 1]."""
        out: Tensor = self.decoder(self.post_quant_conv(z))
        return out

    def decode_strips(self, z: Tensor, plan: StripPlan) -> Tensor:
        """Decode in strips."""
        return self.decoder.strips(self.post_quant_conv(z), plan)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z: (C, 1, 1) each, in the dtype of `like`."""
        both = torch.tensor((self.config.mean, self.config.std), device=like.device)
        mean, std = both.to(like.dtype)[:, :, None, None]
        return mean, std

    def scale(self, z: Tensor) -> Tensor:
        """Turn z of the encoder into what the denoiser works on."""
        mean, std = self._statistics(z)
        return (z - mean) / std

    def unscale(self, latents: Tensor) -> Tensor:
        """Turn the denoiser's latents into z for the decoder."""
        mean, std = self._statistics(latents)
        return latents * std + mean
