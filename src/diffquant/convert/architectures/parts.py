"""PARTS: components that circulate in files of their own, each as a model of one component.

A text encoder alone in a file belongs to no architecture: the same T5 serves many. Of the
components of one kind the first architecture's serves; those that no architecture here has are
added.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    ARCHITECTURES,
    openclip_text,
    qwen2_vl_vision,
    qwen3_text,
    vae_tiny,
)
from diffquant.convert.architectures.base import Architecture, Component, Latent
from diffquant.convert.architectures.generic import GENERIC
from diffquant.convert.architectures.part_members import MEMBERS
from diffquant.convert.architectures.recognised_encoders import KNOWN_ENCODERS
from diffquant.convert.architectures.recognised_vaes import KNOWN_VAES

__all__ = ["PARTS", "PART_ORDER", "TITLES", "VAE_TITLES", "architecture_named", "find_architecture"]

_KNOWN = (*KNOWN_VAES, *KNOWN_ENCODERS)
# Encoders that are read, written and quantized as models of their own.
TITLES = {
    "clip_text": "CLIP text encoder",
    "openclip_text": "OpenCLIP text encoder",
    "t5_encoder": "T5 encoder",
    "qwen2_vl_text": "Qwen2.5-VL",
    "qwen2_vl_vision": "Qwen2.5-VL image tower (mmproj)",
    "qwen3_text": "Qwen3",
    "gemma2_text": "Gemma 2",
    "mistral_text": "Mistral 3",
}
VAE_TITLES = {
    "vae_kl": "KL autoencoder",
    "vae_flux2": "KL autoencoder with a batch norm",
    "vae_qwen": "autoencoder of Wan 2.1 or Qwen-Image",
    "vae_tiny": "tiny autoencoder",
    "vae_tiny_encoder": "tiny autoencoder's encoder",
    "vae_tiny_decoder": "tiny autoencoder's decoder",
}

# In the order files are tried: OpenCLIP before CLIP, whose names it may have.
PART_ORDER = (
    "vae_kl",
    "vae_flux2",
    "vae_qwen",
    "openclip_text",
    "clip_text",
    "t5_encoder",
    "qwen2_vl_text",
    "qwen2_vl_vision",
    "qwen3_text",
    "gemma2_text",
    "mistral_text",
    "vae_tiny",
    "vae_tiny_encoder",
    "vae_tiny_decoder",
    *(row.kind for row in _KNOWN),
)


_TINY = frozenset({"vae_tiny", "vae_tiny_encoder", "vae_tiny_decoder"})
_ALL_TITLES = {**TITLES, **VAE_TITLES, **{row.kind: row.title for row in _KNOWN}}
_MEMBERS = {**MEMBERS, **{row.kind: row.members for row in _KNOWN}}


_OPEN_CLIP = openclip_text.component(
    ARCHITECTURES["sdxl"].component("text_encoder_2").prefixes,
    name="text_encoder_2",
    folder="text_encoder_2",
    alone=True,
)


def _alone(component: Component) -> Architecture:
    return Architecture(
        slug=component.kind,
        title=_ALL_TITLES.get(component.kind, component.kind),
        components=(component,),
        variants=_MEMBERS.get(component.kind, ()),
        keep=vae_tiny.KEEP if component.kind in _TINY else (),
        families=(),
        gguf_architecture="",
        gguf_prefix="",
        latent=Latent(0, 1, None),
        sampling={},
        hyper_defaults={},
        packs_convolutions=component.kind in _TINY,
    )


def _parts() -> dict[str, Architecture]:
    components = [one for row in ARCHITECTURES.values() for one in row.components]
    components += [qwen2_vl_vision.component(), qwen3_text.component()]
    components += [vae_tiny.whole(), vae_tiny.encoder(), vae_tiny.decoder()]
    components += [row.component() for row in _KNOWN]
    found: dict[str, Architecture] = {"openclip_text": _alone(_OPEN_CLIP)}
    for component in components:
        found.setdefault(component.kind, _alone(component))
    return found


PARTS: dict[str, Architecture] = _parts()


def architecture_named(slug: str) -> Architecture:
    """The architecture of that slug, or the part that stands for one; KeyError without either."""
    found = find_architecture(slug)
    if found is None:
        raise KeyError(slug)
    return found


def find_architecture(slug: str) -> Architecture | None:
    """As `architecture_named`; None for a slug that stands for nothing, such as "unknown"."""
    return GENERIC if slug == GENERIC.slug else ARCHITECTURES.get(slug) or PARTS.get(slug)
