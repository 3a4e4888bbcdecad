"""PARTS: components that circulate in files of their own, each as a model of one component.

A text encoder alone in a file belongs to no architecture: the same T5 serves many. Of the
components of one kind the first architecture's serves; those that no architecture here has are
added.
"""

from __future__ import annotations

from diffquant.convert.architectures import ARCHITECTURES, qwen2_vl_vision, qwen3_text
from diffquant.convert.architectures.base import Architecture, Component, Latent

__all__ = ["PARTS", "TITLES", "architecture_named"]

TITLES = {
    "clip_text": "CLIP text encoder",
    "openclip_text": "OpenCLIP text encoder",
    "t5_encoder": "T5 encoder",
    "qwen2_vl_text": "Qwen2.5-VL",
    "qwen2_vl_vision": "Qwen2.5-VL image tower (mmproj)",
    "qwen3_text": "Qwen3",
}


def _alone(component: Component) -> Architecture:
    return Architecture(
        slug=component.kind,
        title=TITLES.get(component.kind, component.kind),
        components=(component,),
        variants=(),
        keep=(),
        families=(),
        gguf_architecture="",
        gguf_prefix="",
        latent=Latent(0, 1, None),
        sampling={},
        hyper_defaults={},
    )


def _parts() -> dict[str, Architecture]:
    components = [one for row in ARCHITECTURES.values() for one in row.components]
    components += [qwen2_vl_vision.component(), qwen3_text.component()]
    found: dict[str, Architecture] = {}
    for component in components:
        found.setdefault(component.kind, _alone(component))
    return found


PARTS: dict[str, Architecture] = _parts()


def architecture_named(slug: str) -> Architecture:
    """The architecture of that slug, or the part that stands for one; KeyError without either."""
    return ARCHITECTURES.get(slug) or PARTS[slug]
