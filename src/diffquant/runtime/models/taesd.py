"""TAESD's decoder: latents to pictures in a row of small convolutions, for previews.

    latents (B, C, h, w) -> tanh(x / 3) * 3 -> 3x3 -> ReLU -> [3 blocks -> x2 -> 3x3] x 3 -> block
    -> 3x3 -> pictures (B, 3, 8h, 8w) in [0, 1]

A block is three 3x3 convolutions with ReLU between them, its input added, then ReLU. Files number
their layers: a decoder alone from 1 (the clamp is 0), Diffusers' from `decoder.layers.0`.
Latents are those the denoiser works on. Source: madebyollin/taesd@5cccb12:taesd.py (Decoder, Block,
Clamp).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from diffquant.convert.binding import bind
from diffquant.core.errors import MissingKeys, UsageError
from diffquant.io import open_source

__all__ = ["decode", "decoder_from"]

_DIFFUSERS = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_PLAIN = re.compile(r"(?:taesd_decoder\.|decoder\.)?(\d+)\.(.+)")
_LAYERS = 19
_BLOCKS = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
_UPS = (6, 11, 16)
_MAX_NBYTES = 256 << 20


def decoder_from(path: Path, channels: int) -> Callable[[Tensor], Tensor]:
    """Read a decoder, alone or beside its encoder.

    Raises:
        UsageError: no decoder of latents with `channels` channels.
    """
    weights: dict[str, Tensor] = {}
    with open_source(path) as source:
        logical = bind(source)
        if sum(spec.nbytes for spec in source.specs.values()) > _MAX_NBYTES:
            raise UsageError(f"{path}: too large for a tiny autoencoder")
        whole = any(_DIFFUSERS.fullmatch(key) for key in logical.tensors)
        pattern, shift = (_DIFFUSERS, 1) if whole else (_PLAIN, 0)
        for key in logical.tensors:
            if found := pattern.fullmatch(key):
                values = torch.tensor(
                    logical.read(key)
                )  # a copy: what is read is not ours to write
                shaped = values.reshape(logical.tensors[key].shape)
                weights[f"{int(found[1]) + shift}.{found[2]}"] = shaped
    try:
        with torch.no_grad():
            made = decode(weights, torch.zeros(1, channels, 2, 2))
    except (MissingKeys, RuntimeError) as error:
        raise UsageError(
            f"{path}: no tiny autoencoder that decodes {channels} channels: {error}"
        ) from error
    if made.shape != (1, 3, 16, 16):
        raise UsageError(f"{path}: decodes to {tuple(made.shape)}, no picture")
    return lambda latents: decode(weights, latents)


def decode(weights: Mapping[str, Tensor], latents: Tensor) -> Tensor:
    """Decode (B, C, h, w) with weights by layer: `1.weight`, `3.conv.0.weight` and so on.

    Raises:
        MissingKeys: a layer is missing.
        RuntimeError: shapes that do not fit.
    """
    x = functional.relu(_conv(weights, "1", torch.tanh(latents / 3) * 3))
    for layer in range(3, _LAYERS):
        if layer in _BLOCKS:
            x = _block(weights, layer, x)
        elif layer in _UPS:
            x = functional.interpolate(x, scale_factor=2.0)
        else:
            x = _conv(weights, str(layer), x)
    return _conv(weights, str(_LAYERS), x)


def _block(weights: Mapping[str, Tensor], layer: int, x: Tensor) -> Tensor:
    y = functional.relu(_conv(weights, f"{layer}.conv.0", x))
    y = functional.relu(_conv(weights, f"{layer}.conv.2", y))
    y = _conv(weights, f"{layer}.conv.4", y)
    if f"{layer}.skip.weight" in weights:
        x = _conv(weights, f"{layer}.skip", x)
    return functional.relu(x + y)


def _conv(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight = weights.get(f"{name}.weight")
    if weight is None:
        raise MissingKeys(f"layer {name} is missing", keys=(f"{name}.weight",))
    return functional.conv2d(
        x, weight, weights.get(f"{name}.bias"), padding=1 if weight.shape[-1] == 3 else 0
    )
