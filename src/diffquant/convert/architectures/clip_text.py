"""CLIP text encoder with transformers' names, which single files use too.

transformers 5 saves it without the leading `text_model.` (package transformers 5.23.0,
models/clip/modeling_clip.py and its conversion mapping); that naming is read, never written.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.architectures.base import Component, Facts, Layout, Signature
from diffquant.convert.architectures.links import Link
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["CLIP_L_DEFAULTS", "component", "published", "text_facts"]

# openai/clip-vit-large-patch14, text config.
CLIP_L_DEFAULTS: Mapping[str, object] = {
    "architectures": ("CLIPTextModel",),
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "projection_dim": 768,
}

_MODULES = ("embeddings", "encoder", "final_layer_norm")
_ALTERNATE = Signature(
    (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "final_layer_norm.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        "encoder.layers.0.mlp.fc1.weight",
    ),
    ("vision_model.", "visual_projection."),
)
_SIGNATURE = Signature(
    tuple(f"text_model.{key}" for key in _ALTERNATE.required), _ALTERNATE.forbidden
)
_POSITIONS = (r"(^|\.)embeddings\.position_ids$", "0, 1, 2 ...: transformers builds it itself")


def published(shapes: Shapes) -> list[Link]:
    """Links that put `text_model.` back."""
    links = [Link((one,), f"text_model.{one}") for one in _MODULES]
    return [*links, Link(("text_projection",), "text_projection")]


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    return published(shapes)


def text_facts(shapes: Shapes) -> Facts:
    """Sizes from transformers' names, with `text_model.` or without."""
    base = "text_model." if any(key.startswith("text_model.") for key in shapes) else ""
    return {
        "vocab_size": width(shapes, f"{base}embeddings.token_embedding.weight", 0),
        "hidden_size": width(shapes, f"{base}embeddings.token_embedding.weight", 1),
        "max_position_embeddings": width(shapes, f"{base}embeddings.position_embedding.weight", 0),
        "num_hidden_layers": count(shapes, f"{base}encoder.layers"),
        "intermediate_size": width(shapes, f"{base}encoder.layers.0.mlp.fc1.weight", 0),
        "projection_dim": width(shapes, "text_projection.weight", 0),
    }


def component(
    prefixes: tuple[str, ...], *, name: str = "text_encoder", folder: str = "text_encoder"
) -> Component:
    """A CLIP text encoder component, at these prefixes in single files."""
    return Component(
        name=name,
        kind="clip_text",
        folder=folder,
        prefixes=prefixes,
        signatures={"canonical": _SIGNATURE, "alternate": _ALTERNATE},
        links=_links,
        facts=text_facts,
        same_names=True,
        ignored=(_POSITIONS, (r"^logit_scale$", "of the image tower's loss, unused here")),
    )
