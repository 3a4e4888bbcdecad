"""Qwen2.5-VL as a text encoder, with the names of its published files.

Newer transformers save the language model as `model.language_model.` and the image tower as
`model.visual.` (huggingface/transformers, models/qwen2_5_vl/modeling_qwen2_5_vl.py,
_checkpoint_conversion_mapping); that naming is read, never written.
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

# Qwen/Qwen2.5-VL-7B-Instruct config.json
DEFAULTS: Mapping[str, object] = {
    "architectures": ("Qwen2_5_VLForConditionalGeneration",),
    "model_type": "qwen2_5_vl",
    "hidden_act": "silu",
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 128000,
    "rope_scaling": {"type": "mrope", "mrope_section": (16, 24, 24)},
    "tie_word_embeddings": False,
}

_LAYER = "layers.0"
_BODY = (
    "embed_tokens.weight",
    f"{_LAYER}.self_attn.q_proj.bias",
    f"{_LAYER}.mlp.gate_proj.weight",
    "norm.weight",
)
_GGUF_BODY = (
    "token_embd.weight",
    "output_norm.weight",
    "blk.0.attn_q.bias",
    "blk.0.ffn_gate.weight",
)


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    return [
        Link(("model.language_model",), "model"),
        Link(("model.visual",), "visual"),
        Link(("lm_head",), "lm_head"),
    ]


def _facts(shapes: Shapes) -> Facts:
    return {
        "vocab_size": width(shapes, "model.embed_tokens.weight", 0),
        "hidden_size": width(shapes, "model.embed_tokens.weight", 1),
        "num_hidden_layers": count(shapes, "model.layers"),
        "intermediate_size": width(shapes, f"model.{_LAYER}.mlp.gate_proj.weight", 0),
    }


def component(prefixes: tuple[str, ...]) -> Component:
    """The text encoder component, at these prefixes in single files."""
    return Component(
        name="text_encoder",
        kind="qwen2_vl_text",
        folder="text_encoder",
        prefixes=prefixes,
        signatures={
            "canonical": Signature(
                tuple(f"model.{one}" for one in _BODY),
                (f"model.{_LAYER}.self_attn.q_norm.", "model.language_model."),
            ),
            "alternate": Signature(
                tuple(f"model.language_model.{one}" for one in _BODY),
                (f"model.language_model.{_LAYER}.self_attn.q_norm.",),
            ),
            "gguf": Signature(_GGUF_BODY, ("blk.0.attn_q_norm.",)),
        },
        gguf=partial(language_rules, alternate="model.language_model."),
        links=_links,
        facts=_facts,
        same_names=True,
    )
