"""Double and single blocks of Flux.1, which Chroma has too: tables, links and sizes.

Key correspondence: huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_flux_transformer_checkpoint_to_diffusers and the one of Chroma;
they write widths down, here they come from shapes.
"""

from __future__ import annotations

from diffquant.convert.architectures.base import Facts, Layout
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["block_facts", "block_links"]

_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}
_DOUBLE_QKV: dict[tuple[str, ...], str] = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn.qkv",
}
_LINEAR1 = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")


def block_facts(shapes: Shapes) -> Facts:
    """Sizes that Diffusers' names tell of either model, as fields of its config.json."""
    hidden = width(shapes, "x_embedder.weight", 0)
    head_dim = width(shapes, "transformer_blocks.0.attn.norm_q.weight", 0)
    return {
        "in_channels": width(shapes, "x_embedder.weight", 1),
        "out_channels": width(shapes, "proj_out.weight", 0),
        "num_layers": count(shapes, "transformer_blocks"),
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim if hidden and head_dim else None,
        "joint_attention_dim": width(shapes, "context_embedder.weight", 1),
    }


def block_links(shapes: Shapes, layout: Layout) -> list[Link]:
    """Links of every double and single block."""
    canonical = layout == "canonical"
    links: list[Link] = []
    for i in range(count(shapes, "double_blocks" if canonical else "transformer_blocks")):
        ours, theirs = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        links += rename_table(_DOUBLE, theirs, ours)
        links += [
            Link(tuple(theirs + one for one in members), ours + fused, "fuse")
            for members, fused in _DOUBLE_QKV.items()
        ]
    for i in range(count(shapes, "single_blocks" if canonical else "single_transformer_blocks")):
        ours, theirs = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        links += rename_table(_SINGLE, theirs, ours)
        members = tuple(theirs + one for one in _LINEAR1)
        rows = _linear1_rows(shapes, ours) if canonical else ()
        links.append(Link(members, f"{ours}linear1", "fuse", rows))
    return links


def _linear1_rows(shapes: Shapes, block: str) -> tuple[int, ...]:
    """Rows of q, k, v and the MLP: attention is as wide as the stream that linear1 reads."""
    total, hidden = shapes.get(f"{block}linear1.weight", (0, 0))
    return (hidden, hidden, hidden, total - 3 * hidden)
