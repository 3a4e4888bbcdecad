"""Tiny autoencoders (TAESD and kin): a plain row of convolutions and residual blocks.

Layers are numbered through; numbers without weights are those that need none, and which they are
follows from their place:

    encoder   conv, then blocks; a conv without a bias halves the picture, and so does one that a
              ReLU follows (taesana)
    decoder   clamp, conv, ReLU, then blocks; what is missing further on doubles the latents.
              Diffusers counts from the conv, leaving the clamp out

A file holds one half, numbered at its top, or both, below `encoder.layers` and `decoder.layers`.
Pictures are [0, 1] inside, [-1, 1] to callers. Latents are those that the denoiser works on, with
no factor or shift; Flux.2's, whose blocks pool, are folded 2x2 as those of its own autoencoder are.
Source: madebyollin/taesd@5cccb12:taesd.py; huggingface/diffusers@58eb52c:
src/diffusers/models/autoencoders/autoencoder_tiny.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffquant.core.errors import ArchitectureError, MissingKeys, UsageError
from diffquant.runtime.layers import QuantConv2d
from diffquant.runtime.models.autoencoder import Autoencoder
from diffquant.runtime.models.facts import Hyper, Shapes, require
from diffquant.runtime.models.feature_map import CONV, RELU, FeatureMap, Reach, StripPlan

__all__ = ["Taesd", "TaesdConfig", "TinyLayer", "config_from"]

_GROUPS = 4  # of the norm inside pooling blocks
_BLOCK = Reach(3)  # three convolutions
_HALVE = Reach(2, down=2, ceil=True)  # of stride 2, padded on both sides
_LOGVAR = -30.0  # latents are certain: the smallest log variance that autoencoders return


@dataclass(frozen=True, slots=True)
class TinyLayer:
    """One layer that has weights, or one that has none.

    Attributes:
        name: its number.
        channels: (in, out); (0, 0) without weights.
        pool: channels inside the pooling branch of a block, 0 without one.
    """

    name: str
    kind: Literal["conv", "block", "relu", "double"]
    channels: tuple[int, int] = (0, 0)
    stride: int = 1
    bias: bool = True
    pool: int = 0


@dataclass(frozen=True, slots=True)
class TaesdConfig:
    """Layers of an autoencoder.

    Attributes:
        encoder, decoder: in order; empty where the file holds only the other half.
        alone: whether the layers are numbered at the top of the file.
        channels: of z, as encoder and decoder have it.
        fold: pixels of z in a latent of the loop, along each side.
        factor: pixels per latent of the loop, along each side.
    """

    encoder: tuple[TinyLayer, ...]
    decoder: tuple[TinyLayer, ...]
    alone: bool
    channels: int
    fold: int
    factor: int

    @property
    def latents(self) -> int:
        """Channels of the latents the loop holds."""
        return self.channels * self.fold**2


def config_from(shapes: Shapes, hyper: Hyper) -> TaesdConfig:
    """Read the layers from keys.

    Hyper: act_fn, upsample_fn, upsampling_scaling_factor, scaling_factor, shift_factor of a config
    that is a tiny autoencoder's; one of another autoencoder says nothing here.

    Raises:
        ArchitectureError: the halves disagree, or a config asks for what this runtime has not.
    """
    if hyper.get("_class_name") == "AutoencoderTiny":
        require(hyper, "act_fn", ("relu",))
        require(hyper, "upsample_fn", ("nearest",))
        require(hyper, "upsampling_scaling_factor", (2,))
        require(hyper, "scaling_factor", (1,))
        require(hyper, "shift_factor", (0,))
    alone = not any(key.startswith(("encoder.", "decoder.")) for key in shapes)
    if alone:
        decodes = "0.weight" not in shapes  # a clamp is first
        encoder = () if decodes else _encoder(_found(shapes, ""))
        decoder = _decoder(_found(shapes, "")) if decodes else ()
    else:
        encoder = _encoder(_found(shapes, "encoder.layers."))
        decoder = _decoder(_found(shapes, "decoder.layers."))
    made = {encoder[-1].channels[1]} if encoder else set()
    read = {decoder[0].channels[0]} if decoder else set()
    factors = {1 << sum(one.stride > 1 for one in encoder)} if encoder else set()
    factors |= {1 << sum(one.kind == "double" for one in decoder)} if decoder else set()
    if len(made | read) != 1 or len(factors) != 1:
        raise ArchitectureError(
            f"encoder and decoder disagree: channels {sorted(made)} and {sorted(read)}, pixels per "
            f"latent {sorted(factors)}"
        )
    fold = 2 if any(one.pool for one in (*encoder, *decoder)) else 1
    (channels,), (factor,) = made | read, factors
    return TaesdConfig(encoder, decoder, alone, channels, fold, factor * fold)


def _found(shapes: Shapes, prefix: str) -> list[TinyLayer | None]:
    """Layers by number; None where the file has no weights."""
    local = {k[len(prefix) :]: shape for k, shape in shapes.items() if k.startswith(prefix)}
    numbers = {int(key.partition(".")[0]) for key in local if key.partition(".")[0].isdecimal()}
    if not numbers:
        raise MissingKeys(f"no numbered layers below {prefix or 'the top'!r}", keys=(f"{prefix}0",))
    return [_layer(local, str(n)) for n in range(max(numbers) + 1)]


def _layer(local: Shapes, name: str) -> TinyLayer | None:
    if f"{name}.conv.0.weight" in local:
        after, before = local[f"{name}.conv.0.weight"][:2]
        pool = local.get(f"{name}.pool.0.weight", (0,))[0]
        return TinyLayer(name, "block", (before, after), pool=pool)
    if f"{name}.weight" in local:
        after, before = local[f"{name}.weight"][:2]
        return TinyLayer(name, "conv", (before, after), bias=f"{name}.bias" in local)
    return None


def _encoder(found: list[TinyLayer | None]) -> tuple[TinyLayer, ...]:
    layers = [one or TinyLayer(str(n), "relu") for n, one in enumerate(found)]
    rows = []
    for one, following in pairwise([*layers, layers[-1]]):
        halves = one.kind == "conv" and (following.kind == "relu" or not one.bias)
        rows.append(replace(one, stride=2) if halves else one)
    return tuple(rows)


def _decoder(found: list[TinyLayer | None]) -> tuple[TinyLayer, ...]:
    first = next(n for n, one in enumerate(found) if one is not None)
    rows = []
    for n, one in enumerate(found[first:], start=first):
        gap: Literal["relu", "double"] = "relu" if n == first + 1 else "double"
        rows.append(one or TinyLayer(str(n), gap))
    return tuple(rows)


class _Pool(nn.Sequential):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__(
            QuantConv2d(channels, inner, 1, bias=False),
            nn.GroupNorm(_GROUPS, inner),
            nn.ReLU(),
            QuantConv2d(inner, channels, 1, bias=False),
        )


class _Block(nn.Module):
    def __init__(self, row: TinyLayer) -> None:
        super().__init__()
        before, after = row.channels
        self.conv = nn.Sequential(
            QuantConv2d(before, after, 3, padding=1),
            nn.ReLU(),
            QuantConv2d(after, after, 3, padding=1),
            nn.ReLU(),
            QuantConv2d(after, after, 3, padding=1),
        )
        self.channels, self.changes = after, before != after
        self.skip = QuantConv2d(before, after, 1, bias=False) if self.changes else nn.Identity()
        self.pool = _Pool(before, row.pool) if row.pool else None

    def forward(self, x: Tensor) -> Tensor:
        return self._plain(x if self.pool is None else x + self.pool(x))

    def strips(self, x: FeatureMap) -> FeatureMap:
        layer = self._plain if self.pool is None else self._pooled(x, *self.pool)
        return x.map(layer, self.channels, _BLOCK, inplace=not self.changes)

    def _pooled(
        self, x: FeatureMap, narrow: nn.Module, norm: nn.GroupNorm, _: nn.Module, wide: nn.Module
    ) -> Callable[[Tensor], Tensor]:
        normed = x.group_norm(norm, RELU, of=narrow)
        return lambda strip: self._plain(strip + wide(normed(narrow(strip))))

    def _plain(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv(x) + self.skip(x))


def _module(row: TinyLayer) -> nn.Module:
    match row.kind:
        case "block":
            return _Block(row)
        case "conv":
            return QuantConv2d(*row.channels, 3, stride=row.stride, padding=1, bias=row.bias)
        case "relu":
            return nn.ReLU()
        case "double":
            return nn.Upsample(scale_factor=2, mode="nearest")


class _Half(nn.Module):
    def __init__(self, rows: Iterable[TinyLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({row.name: _module(row) for row in rows})


class Taesd(Autoencoder):
    """Encoder, decoder, or both, as the file has them."""

    def __init__(self, config: TaesdConfig) -> None:
        """Build the modules; weights are bound later."""
        super().__init__()
        self.config: TaesdConfig = config
        if config.alone:
            for row in (*config.encoder, *config.decoder):
                self.add_module(row.name, _module(row))
        else:
            self.encoder, self.decoder = _Half(config.encoder), _Half(config.decoder)

    def _layers(self, half: Literal["encoder", "decoder"]) -> Iterator[tuple[TinyLayer, nn.Module]]:
        rows = getattr(self.config, half)
        if not rows:
            raise UsageError(
                f"this tiny autoencoder's file holds no {half}: give the one that does"
            )
        root = "" if self.config.alone else f"{half}.layers."
        for row in rows:
            yield row, self.get_submodule(root + row.name)

    def _run(self, x: Tensor, half: Literal["encoder", "decoder"]) -> Tensor:
        for _, layer in self._layers(half):
            x = layer(x)
        return x

    def _strips(self, x: FeatureMap, half: Literal["encoder", "decoder"]) -> FeatureMap:
        doubled: list[nn.Module] = []  # computed with the convolution after it: no map of its own
        for row, layer in self._layers(half):
            match row.kind:
                case "double":
                    doubled.append(layer)
                case "relu":
                    x = x.map(layer, x.data.shape[1], inplace=True)
                case "conv" if doubled:
                    up = 1 << len(doubled)
                    x = x.map(nn.Sequential(*doubled, layer), row.channels[1], Reach(1, up=up))
                    doubled = []
                case "conv":
                    x = x.map(layer, row.channels[1], CONV if row.stride == 1 else _HALVE)
                case "block":
                    assert isinstance(layer, _Block)
                    x = layer.strips(x)
        assert not doubled, "a doubling is followed by a convolution"
        return x

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures (B, 3, H, W) in [-1, 1]: latents as mean, without variance."""
        z = functional.pixel_unshuffle(self._run(pixels / 2 + 0.5, "encoder"), self.config.fold)
        return z, torch.full_like(z, _LOGVAR)

    def encode_strips(self, pixels: Tensor, plan: StripPlan) -> tuple[Tensor, Tensor]:
        """Encode in strips."""
        x = self._strips(FeatureMap.of(pixels / 2 + 0.5, plan), "encoder")
        z = functional.pixel_unshuffle(x.whole(), self.config.fold)
        return z, torch.full_like(z, _LOGVAR)

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B, C, h, w): pictures (B, 3, H, W), about [-1, 1]."""
        z = functional.pixel_shuffle(z, self.config.fold)
        return self._run(torch.tanh(z / 3) * 3, "decoder") * 2 - 1

    def decode_strips(self, z: Tensor, plan: StripPlan) -> Tensor:
        """Decode in strips."""
        z = functional.pixel_shuffle(z, self.config.fold)
        x = self._strips(FeatureMap.of(torch.tanh(z / 3) * 3, plan), "decoder")
        return x.data.mul_(2).sub_(1)

    def scale(self, z: Tensor) -> Tensor:
        """Give z back: it is what the denoiser works on."""
        return z

    def unscale(self, latents: Tensor) -> Tensor:
        """Give the latents back: the decoder was trained on them as they are."""
        return latents
