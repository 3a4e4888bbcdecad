"""Gemma 2 as a text encoder (Lumina 2): norms before and after attention and feed forward.

Its base class saves the names without `model.` (huggingface/transformers,
models/gemma2/modeling_gemma2.py, Gemma2Model); that naming is read, never written.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.architectures.base import Component, Facts, Layout, Signature
from diffquant.convert.architectures.links import Link
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["DEFAULTS", "component"]

# google/gemma-2-2b config.json; heads of 256.
DEFAULTS: Mapping[str, object] = {
    "architectures": ("Gemma2Model",),
    "model_type": "gemma2",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "head_dim": 256,
}

_LAYER = "layers.0"
_BODY = (
    "embed_tokens.weight",
    f"{_LAYER}.pre_feedforward_layernorm.weight",
    f"{_LAYER}.post_feedforward_layernorm.weight",
    f"{_LAYER}.self_attn.q_proj.weight",
    f"{_LAYER}.mlp.gate_proj.weight",
    "norm.weight",
)
_THIRD = (f"{_LAYER}.self_attn.q_norm.", "vision_tower.", "visual.")  # Gemma 3 norms queries


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = [Link((one,), f"model.{one}") for one in ("embed_tokens", "layers", "norm")]
    return [*links, Link(("lm_head",), "lm_head")]


def _facts(shapes: Shapes) -> Facts:
    return {
        "vocab_size": width(shapes, "model.embed_tokens.weight", 0),
        "hidden_size": width(shapes, "model.embed_tokens.weight", 1),
        "num_hidden_layers": count(shapes, "model.layers"),
        "intermediate_size": width(shapes, f"model.{_LAYER}.mlp.gate_proj.weight", 0),
    }


def component(prefixes: tuple[str, ...] = ()) -> Component:
    """The text encoder component, at these prefixes in single files."""
    return Component(
        name="text_encoder",
        kind="gemma2_text",
        folder="text_encoder",
        prefixes=prefixes,
        signatures={
            "canonical": Signature(
                tuple(f"model.{one}" for one in _BODY), tuple(f"model.{one}" for one in _THIRD)
            ),
            "alternate": Signature(_BODY, _THIRD),
        },
        links=_links,
        facts=_facts,
        same_names=True,
        ignored=((r"^spiece_model$", "the tokenizer, not a weight"),),
    )
