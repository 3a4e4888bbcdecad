"""llama.cpp's names of the Qwen language models and of Qwen2.5-VL's image tower.

Sources: gguf-py 0.19.0 gguf/tensor_mapping.py (MODEL_ARCH.QWEN2VL, QWEN3, MMPROJ);
ggml-org/llama.cpp convert_hf_to_gguf.py, Qwen2VLVisionModel.modify_tensors (fused q, k, v are
split; the patch embedding, a convolution over two frames, is one tensor per frame). Rows of q and k
keep transformers' order: only the Llama family is permuted.
"""

from __future__ import annotations

from diffquant.convert.architectures.base import Layout
from diffquant.convert.architectures.links import Link, backward, forward, rename_table
from diffquant.convert.architectures.names import count
from diffquant.convert.rules import Rule, Shapes
from diffquant.convert.slices import Slices, Stack

__all__ = ["language_rules", "vision_rules"]

_TOP = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_out": "attn.proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOWER = {
    "v.post_ln": "merger.ln_q",
    "mm.0": "merger.mlp.0",
    "mm.2": "merger.mlp.2",
}
_FRAMES = ("v.patch_embd.weight", "v.patch_embd.weight.1")
_FRAME_AXIS = 2  # (out, in, frames, height, width)


def language_rules(shapes: Shapes, layout: Layout, *, alternate: str = "") -> tuple[Rule, ...]:
    """Rules between llama.cpp's and transformers' names of a language model.

    Args:
        shapes: in `layout`.
        layout: "gguf" leads to the canonical `model.` names; any other to llama.cpp's.
        alternate: what stands for `model.` in layout "alternate".
    """
    theirs = layout == "gguf"
    base = alternate if layout == "alternate" else "model."
    links = [*rename_table(_TOP, "", base), Link(("output",), "lm_head")]
    for i in range(count(shapes, "blk" if theirs else f"{base}layers")):
        links += rename_table(_LAYER, f"blk.{i}.", f"{base}layers.{i}.")
    return forward(links, shapes) if theirs else backward(links, shapes)


def vision_rules(shapes: Shapes, layout: Layout) -> tuple[Rule, ...]:
    """Rules between llama.cpp's and transformers' names of Qwen2.5-VL's image tower."""
    theirs = layout == "gguf"
    base = "model.visual." if layout == "alternate" else "visual."
    links = rename_table(_TOWER, "", base)
    for i in range(count(shapes, "v.blk" if theirs else f"{base}blocks")):
        links += rename_table(_BLOCK, f"v.blk.{i}.", f"{base}blocks.{i}.")
        members = tuple(f"v.blk.{i}.attn_{one}" for one in "qkv")
        links.append(Link(members, f"{base}blocks.{i}.attn.qkv", "fuse"))
    patch = f"{base}patch_embed.proj.weight"
    frames: list[Rule] = []
    if theirs:
        frames.append(Stack(_FRAMES, patch, _FRAME_AXIS))
    elif patch in shapes:
        frames.append(Slices(patch, _FRAMES, _FRAME_AXIS))
    return (*frames, *(forward(links, shapes) if theirs else backward(links, shapes)))
