"""Qwen2.5-VL's image tower as a file of its own, which llama.cpp calls mmproj.

In transformers' files it lies beside the language model, under `visual.`, and is part of that
component; it stands alone in GGUF only, where ComfyUI-GGUF and stable-diffusion.cpp look for it.
"""

from __future__ import annotations

from diffquant.convert.architectures.base import Component, Facts, Layout, Signature
from diffquant.convert.architectures.links import Link
from diffquant.convert.architectures.names import count, width
from diffquant.convert.architectures.qwen_gguf import vision_rules
from diffquant.convert.rules import Shapes

__all__ = ["TOWER", "component", "is_tower"]

TOWER = ("visual.", "model.visual.")


def is_tower(key: str) -> bool:
    """Whether a key of Qwen2.5-VL, in either of its namings, belongs to the image tower."""
    return key.startswith(TOWER)


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    return [Link(("model.visual",), "visual")]


def _facts(shapes: Shapes) -> Facts:
    return {
        "depth": count(shapes, "visual.blocks"),
        "hidden_size": width(shapes, "visual.patch_embed.proj.weight", 0),
        "intermediate_size": width(shapes, "visual.blocks.0.mlp.gate_proj.weight", 0),
        "out_hidden_size": width(shapes, "visual.merger.mlp.2.weight", 0),
        "patch_size": width(shapes, "visual.patch_embed.proj.weight", 3),
        "temporal_patch_size": width(shapes, "visual.patch_embed.proj.weight", 2),
    }


def component() -> Component:
    """The image tower, alone in a file."""
    body = (
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.mlp.gate_proj.weight",
        "merger.mlp.2.weight",
    )
    return Component(
        name="mmproj",
        kind="qwen2_vl_vision",
        folder="mmproj",
        prefixes=(),
        signatures={
            "canonical": Signature(
                tuple(f"visual.{one}" for one in body), ("model.", "language_model.")
            ),
            "alternate": Signature(
                tuple(f"model.visual.{one}" for one in body), ("model.language_model.",)
            ),
            "gguf": Signature(
                (
                    "v.patch_embd.weight",
                    "v.patch_embd.weight.1",
                    "v.blk.0.attn_q.weight",
                    "v.blk.0.ffn_gate.weight",
                    "mm.2.weight",
                ),
            ),
        },
        links=_links,
        facts=_facts,
        same_names=True,
        gguf=vision_rules,
    )
