"""Tiny autoencoders (TAESD and kin): a plain row of layers, numbered through.

Files hold an encoder, a decoder, or, from Diffusers, both. Which model a tiny autoencoder serves
follows from its latent channels, and from the pooling blocks that Flux.2's has
(madebyollin/taesd@5cccb12:taesd.py; huggingface/diffusers@58eb52c:
src/diffusers/models/autoencoders/autoencoder_tiny.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from diffquant.convert.architectures.base import Component, Facts, Keep, Signature, Variant
from diffquant.convert.architectures.names import count, index_of, width
from diffquant.convert.rules import Shapes

__all__ = ["KEEP", "VARIANTS", "decoder", "encoder", "whole"]

# First and last convolution of a half, and those between resolutions: what stands outside of the
# residual blocks. Inside one an error is added to what the skip carries unharmed; here all that
# follows is made from the rounded weights.
KEEP = (
    Keep(
        r"(^|\.layers\.)\d+\.weight$",
        "outside of the residual blocks (first, last, between resolutions): nothing goes around it",
        "measured on taef2: docs/lab-log.md",
    ),
)

VARIANTS = (
    Variant("taef2", {"_pool": True}, "32 channels and pooling blocks: Flux.2's"),
    Variant(
        "taesd",
        {"latent_channels": 4},
        "4 latent channels: SD 1.x and 2.x or SDXL, which no header tells apart",
    ),
    Variant(
        "taef1",
        {"latent_channels": 16},
        "16 latent channels: Flux.1 or SD 3, which no header tells apart",
    ),
    Variant("taesana", {"latent_channels": 32}, "32 latent channels without pooling: Sana's"),
    Variant("", {}, "of an unlisted model"),
)


def _last(shapes: Shapes, prefix: str = "") -> int:
    """Number of the last layer."""
    if prefix:
        return count(shapes, prefix) - 1
    found = {index_of(key.partition(".")[0]) for key in shapes}
    return max((one for one in found if one is not None), default=0)


def _facts(shapes: Shapes) -> Facts:
    return {"_pool": any(".pool." in key for key in shapes)}


def _decoder_facts(shapes: Shapes) -> Facts:
    return {**_facts(shapes), "latent_channels": width(shapes, "1.weight", 1)}


def _encoder_facts(shapes: Shapes) -> Facts:
    made = width(shapes, f"{_last(shapes)}.weight", 0)
    return {**_facts(shapes), "latent_channels": made}


def _whole_facts(shapes: Shapes) -> Facts:
    last = f"encoder.layers.{_last(shapes, 'encoder.layers')}.weight"
    return {**_facts(shapes), "latent_channels": width(shapes, last, 0)}


def _component(kind: str, required: tuple[str, ...], facts: Callable[[Shapes], Facts]) -> Component:
    return Component(
        name="vae",
        kind=kind,
        folder="vae",
        prefixes=("taesd.",),
        signatures={"canonical": Signature(required)},
        links=None,
        facts=facts,
    )


def decoder() -> Component:
    """A decoder alone: a clamp is layer 0, the first convolution layer 1."""
    required = (
        "1.weight",
        "3.conv.0.weight",
        "3.conv.2.weight",
        "3.conv.4.weight",
        "4.conv.0.bias",
    )
    return _component("vae_tiny_decoder", required, _decoder_facts)


def encoder() -> Component:
    """An encoder alone: a convolution and a block, or two convolutions."""
    required = ("0.weight", "2.weight", "4.conv.0.weight", "4.conv.2.weight", "4.conv.4.weight")
    return _component("vae_tiny_encoder", required, _encoder_facts)


def whole() -> Component:
    """Both, with Diffusers' names."""
    required = tuple(
        f"{side}.layers.{n}"
        for side, layers in (
            ("encoder", ("0.weight", "1.conv.0.weight", "3.conv.4.weight")),
            ("decoder", ("0.weight", "2.conv.0.weight", "2.conv.4.weight")),
        )
        for n in layers
    )
    return replace(
        _component("vae_tiny", required, _whole_facts),
        signatures={"diffusers": Signature(required)},
    )
