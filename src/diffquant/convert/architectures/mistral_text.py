"""Mistral 3 (Small 3.1, 24B) as the text encoder of Flux.2 dev.

Names are those of any Llama; its vocabulary of 131072 parts it from the others. Single files have
`model.` names. Diffusers folders hold a Mistral3ForConditionalGeneration, whose published names are
`language_model.model.` beside an image tower (package transformers 5.23.0, conversion_mapping.py;
huggingface/diffusers@58eb52c:src/diffusers/pipelines/flux2/pipeline_flux2.py): it loads no others.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.architectures.base import Component, Facts, Layout, Signature
from diffquant.convert.architectures.links import Link
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["DEFAULTS", "component"]

# mistralai/Mistral-Small-3.1-24B-Base-2503 config.json
DEFAULTS: Mapping[str, object] = {
    "architectures": ("Mistral3ForConditionalGeneration",),
    "model_type": "mistral3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000000.0,
    "head_dim": 128,
}

_LAYER = "layers.0"
_BODY = (
    "embed_tokens.weight",
    f"{_LAYER}.self_attn.q_proj.weight",
    f"{_LAYER}.post_attention_layernorm.weight",
    f"{_LAYER}.mlp.gate_proj.weight",
    "norm.weight",
)
_FOREIGN = (
    f"{_LAYER}.self_attn.q_norm.",
    f"{_LAYER}.self_attn.q_proj.bias",
    f"{_LAYER}.pre_feedforward_layernorm.",
)


_BASES: Mapping[Layout, str] = {"canonical": "", "diffusers": "language_model."}
_THEIRS = "language_model.model."


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    return [
        Link(("language_model.model",), "model"),
        Link(("language_model.lm_head",), "lm_head"),
        Link(("vision_tower",), "vision_tower"),
        Link(("multi_modal_projector",), "multi_modal_projector"),
    ]


def _facts(shapes: Shapes) -> Facts:
    return {
        "vocab_size": width(shapes, f"{_THEIRS}embed_tokens.weight", 0),
        "hidden_size": width(shapes, f"{_THEIRS}embed_tokens.weight", 1),
        "num_hidden_layers": count(shapes, f"{_THEIRS}layers"),
        "intermediate_size": width(shapes, f"{_THEIRS}{_LAYER}.mlp.gate_proj.weight", 0),
    }


def component(prefixes: tuple[str, ...] = ()) -> Component:
    """The text encoder component, at these prefixes in single files."""
    signatures = {
        layout: Signature(
            tuple(f"{base}model.{one}" for one in _BODY),
            tuple(f"{base}model.{one}" for one in _FOREIGN),
        )
        for layout, base in _BASES.items()
    }
    return Component(
        name="text_encoder",
        kind="mistral_text",
        folder="text_encoder",
        prefixes=prefixes,
        signatures=signatures,
        links=_links,
        facts=_facts,
        where={"vocab_size": (131072,)},
    )
