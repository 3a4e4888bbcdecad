"""T5 encoder with transformers' names, which single files use too.

Its token embedding is stored as `shared.weight`; some files repeat it as
`encoder.embed_tokens.weight` (huggingface/transformers@v5, models/t5/modeling_t5.py,
T5EncoderModel._tied_weights_keys). llama.cpp's names of a T5 encoder: gguf-py 0.19.0
gguf/tensor_mapping.py, MODEL_ARCH.T5ENCODER; `wi_1` is its ffn_up, `wi_0` its ffn_gate.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.architectures.base import Component, Facts, Layout, Signature
from diffquant.convert.architectures.links import Link, backward, forward, rename_table
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Rule, Shapes

__all__ = ["DEFAULTS", "component"]

# google/t5-v1_1-xxl, as in black-forest-labs/FLUX.1-dev text_encoder_2/config.json.
DEFAULTS: Mapping[str, object] = {
    "architectures": ("T5EncoderModel",),
    "model_type": "t5",
    "dense_act_fn": "gelu_new",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "relative_attention_max_distance": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
    "tie_word_embeddings": False,
    "dropout_rate": 0.1,
}

_BLOCK = "encoder.block.0.layer"
_BODY = (
    "encoder.final_layer_norm.weight",
    f"{_BLOCK}.0.SelfAttention.q.weight",
    f"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight",
    f"{_BLOCK}.1.DenseReluDense.wo.weight",
)
_SECOND_BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"  # UMT5
_GGUF_BODY = (
    "token_embd.weight",
    "enc.output_norm.weight",
    "enc.blk.0.attn_q.weight",
    "enc.blk.0.attn_rel_b.weight",
    "enc.blk.0.ffn_down.weight",
)


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    return [
        Link(("encoder.embed_tokens",), "shared"),
        Link(("encoder.block",), "encoder.block"),
        Link(("encoder.final_layer_norm",), "encoder.final_layer_norm"),
    ]


_GGUF_TOP = {
    "enc.output_norm": "encoder.final_layer_norm",
    "token_embd": "shared",
}
_GGUF_BLOCK = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_PLAIN_UP = "layer.1.DenseReluDense.wi"  # of the first T5, whose feed forward has no gate


def _gguf(shapes: Shapes, layout: Layout) -> tuple[Rule, ...]:
    theirs = layout == "gguf"
    links = rename_table(_GGUF_TOP)
    if not theirs and "shared.weight" not in shapes:
        links.append(Link(("token_embd",), "encoder.embed_tokens"))
    for i in range(count(shapes, "enc.blk" if theirs else "encoder.block")):
        gate = f"enc.blk.{i}.ffn_gate.weight" if theirs else f"encoder.block.{i}.{_PLAIN_UP}.weight"
        plain = (gate not in shapes) if theirs else (gate in shapes)
        block = {**_GGUF_BLOCK, "ffn_up": _PLAIN_UP} if plain else _GGUF_BLOCK
        links += rename_table(block, f"enc.blk.{i}.", f"encoder.block.{i}.")
    return forward(links, shapes) if theirs else backward(links, shapes)


def _facts(shapes: Shapes) -> Facts:
    heads = width(shapes, f"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight", 1)
    inner = width(shapes, f"{_BLOCK}.0.SelfAttention.q.weight", 0)
    gated = f"{_BLOCK}.1.DenseReluDense.wi_1.weight" in shapes
    return {
        "vocab_size": width(shapes, "shared.weight", 0),
        "d_model": width(shapes, "shared.weight", 1),
        "d_ff": width(shapes, f"{_BLOCK}.1.DenseReluDense.wo.weight", 1),
        "d_kv": inner // heads if inner and heads else None,
        "num_layers": count(shapes, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": width(
            shapes, f"{_BLOCK}.0.SelfAttention.relative_attention_bias.weight", 0
        ),
        "is_gated_act": gated,
        "_bias_per_layer": _SECOND_BIAS in shapes,
    }


def component(
    prefixes: tuple[str, ...], *, name: str = "text_encoder", folder: str = "text_encoder_2"
) -> Component:
    """A T5 encoder component, at these prefixes in single files."""
    return Component(
        name=name,
        kind="t5_encoder",
        folder=folder,
        prefixes=prefixes,
        signatures={
            "canonical": Signature(("shared.weight", *_BODY), ("decoder.",)),
            "alternate": Signature(
                ("encoder.embed_tokens.weight", *_BODY), ("decoder.", "shared.")
            ),
            "gguf": Signature(_GGUF_BODY, ("dec.",)),
        },
        gguf=_gguf,
        links=_links,
        facts=_facts,
        same_names=True,
        ignored=(
            (r"^encoder\.embed_tokens\.weight$", "copy of shared.weight"),
            (r"^(logit_scale|spiece_model)$", "not a weight of the encoder"),
        ),
    )
