"""The autoencoder of Flux.2: the KL autoencoder with 32 channels and a batch norm over patches.

Black Forest Labs put the quantizing convolutions inside encoder and decoder
(black-forest-labs/flux2:src/flux2/autoencoder.py; huggingface/diffusers@58eb52c:
src/diffusers/models/autoencoders/autoencoder_kl_flux2.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffquant.convert.architectures import vae_kl
from diffquant.convert.architectures.base import Component, Facts, Layout, Signature
from diffquant.convert.architectures.links import Link
from diffquant.convert.architectures.names import width
from diffquant.convert.rules import Shapes

__all__ = ["DEFAULTS", "component"]

DEFAULTS: Mapping[str, object] = {
    **vae_kl.DEFAULTS,
    "_class_name": "AutoencoderKLFlux2",
    "latent_channels": 32,
    "sample_size": 1024,
    "batch_norm_eps": 1e-4,
    "patch_size": (2, 2),
}

_QUANT = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
_BASE = vae_kl.component(())


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = [one for one in _BASE.links_of(shapes, layout) if one.canonical not in _QUANT]
    links += [Link((theirs,), ours) for theirs, ours in _QUANT.items()]
    return [*links, Link(("bn",), "bn")]


def _facts(shapes: Shapes) -> Facts:
    return {**_BASE.facts(shapes), "_normed": width(shapes, "bn.running_mean", 0)}


def _signature(signature: Signature) -> Signature:
    foreign = tuple(one for one in signature.forbidden if one != "bn.")
    return Signature((*signature.required, "bn.running_mean", "bn.running_var"), foreign)


def component(prefixes: tuple[str, ...]) -> Component:
    """The vae component, at these prefixes in single files."""
    return replace(
        _BASE,
        kind="vae_flux2",
        prefixes=prefixes,
        signatures={layout: _signature(one) for layout, one in _BASE.signatures.items()},
        links=_links,
        facts=_facts,
    )
