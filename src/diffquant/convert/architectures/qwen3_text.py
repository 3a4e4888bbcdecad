"""Qwen3 as a text encoder (Z-Image, Flux.2 klein): dense, with normed queries and keys.

Its base class saves the names without `model.` (huggingface/transformers,
models/qwen3/modeling_qwen3.py, Qwen3Model); that naming is read, never written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from diffquant.convert.architectures.base import Component, Facts, Layout, Signature
from diffquant.convert.architectures.links import Link
from diffquant.convert.architectures.names import count, width
from diffquant.convert.architectures.qwen_gguf import language_rules
from diffquant.convert.rules import Shapes

__all__ = ["DEFAULTS", "component"]

# Qwen/Qwen3-4B config.json; heads follow from the shapes.
DEFAULTS: Mapping[str, object] = {
    "architectures": ("Qwen3ForCausalLM",),
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
}

_LAYER = "layers.0"
_BODY = (
    "embed_tokens.weight",
    f"{_LAYER}.self_attn.q_norm.weight",
    f"{_LAYER}.input_layernorm.weight",
    f"{_LAYER}.post_attention_layernorm.weight",
    f"{_LAYER}.mlp.gate_proj.weight",
    "norm.weight",
)
# What relatives with normed queries have besides: Gemma 3 and 4, Doge, Afmoe, mixtures of experts.
_RELATIVES = (
    f"{_LAYER}.pre_feedforward_layernorm.",
    f"{_LAYER}.post_feedforward_layernorm.",
    f"{_LAYER}.pre_mlp_layernorm.",
    f"{_LAYER}.input_layernorm.bias",
    f"{_LAYER}.input_residual",
    f"{_LAYER}.self_attn.g_proj.",
    f"{_LAYER}.layer_scalar",
    f"{_LAYER}.self_attn.sinks",
    "layers.1.mlp.experts.",
    "layers.1.mlp.gate.",
)


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = [Link((one,), f"model.{one}") for one in ("embed_tokens", "layers", "norm")]
    return [*links, Link(("lm_head",), "lm_head")]


def _facts(shapes: Shapes) -> Facts:
    attention = f"model.{_LAYER}.self_attn"
    head = width(shapes, f"{attention}.q_norm.weight", 0)
    heads, pairs = (width(shapes, f"{attention}.{one}_proj.weight", 0) for one in "qk")
    return {
        "vocab_size": width(shapes, "model.embed_tokens.weight", 0),
        "hidden_size": width(shapes, "model.embed_tokens.weight", 1),
        "num_hidden_layers": count(shapes, "model.layers"),
        "intermediate_size": width(shapes, f"model.{_LAYER}.mlp.gate_proj.weight", 0),
        "head_dim": head,
        "num_attention_heads": heads // head if heads and head else None,
        "num_key_value_heads": pairs // head if pairs and head else None,
    }


def component(prefixes: tuple[str, ...] = ()) -> Component:
    """The text encoder component, at these prefixes in single files."""
    towers = ("visual.", "model.visual.")
    return Component(
        name="text_encoder",
        kind="qwen3_text",
        folder="text_encoder",
        prefixes=prefixes,
        signatures={
            "canonical": Signature(
                tuple(f"model.{one}" for one in _BODY),
                (*towers, *(f"model.{one}" for one in _RELATIVES)),
            ),
            "alternate": Signature(_BODY, (*towers, *_RELATIVES)),
            "gguf": Signature(
                (
                    "token_embd.weight",
                    "output_norm.weight",
                    "blk.0.attn_q_norm.weight",
                    "blk.0.ffn_gate.weight",
                ),
            ),
        },
        links=_links,
        facts=_facts,
        same_names=True,
        gguf=partial(language_rules, alternate=""),
    )
