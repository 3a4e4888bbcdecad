"""OpenCLIP text encoder (bigG in SDXL, H in SD2): open_clip names are canonical.

Diffusers folders have transformers' names. open_clip stores attention fused as a bare parameter
(`attn.in_proj_weight`), and `text_projection` is a bare parameter too, the transpose of the linear
weight of transformers (huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_open_clip_checkpoint). SD2 reads the last layer but one, so its Diffusers folders lack the
last layer and the projection (SD_2_TEXT_ENCODER_KEYS_TO_IGNORE in the same file).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from diffquant.convert.architectures.base import Component, Layout, Signature
from diffquant.convert.architectures.clip_text import published, text_facts
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import count
from diffquant.convert.rules import Shapes

__all__ = ["BIGG_DEFAULTS", "H_DEFAULTS", "component"]

# stabilityai/stable-diffusion-xl-base-1.0: text_encoder_2/config.json.
BIGG_DEFAULTS: Mapping[str, object] = {
    "architectures": ("CLIPTextModelWithProjection",),
    "model_type": "clip_text_model",
    "hidden_act": "gelu",
    "num_attention_heads": 20,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

# stabilityai/stable-diffusion-2-1: text_encoder/config.json.
H_DEFAULTS: Mapping[str, object] = {
    **BIGG_DEFAULTS,
    "architectures": ("CLIPTextModel",),
    "num_attention_heads": 16,
    "projection_dim": 512,
}

_TOP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _links(shapes: Shapes, layout: Layout, *, penultimate: bool = False) -> list[Link]:
    base = "" if layout == "alternate" else "text_model."
    links = rename_table(_TOP, base)
    if penultimate:
        links.append(Link((), "text_projection", "drop", reason="not read"))
    else:
        links.append(Link(("text_projection.weight",), "text_projection", "transpose"))
    links.append(
        Link((), "logit_scale", "drop", reason="scale of the training loss; transformers has none")
    )
    blocks = "transformer.resblocks"
    unread = "after the layer that is read"
    original = "text_projection" in shapes  # what came from a folder has nothing left to drop
    layers = count(shapes, blocks if layout == "canonical" else f"{base}encoder.layers")
    for i in range(layers):
        theirs, ours = f"{base}encoder.layers.{i}.", f"{blocks}.{i}."
        if penultimate and original and i == layers - 1:
            links.append(Link((), f"{blocks}.{i}", "drop", reason=unread))
            continue
        links += rename_table(_LAYER, theirs, ours)
        for leaf in ("weight", "bias"):
            members = tuple(f"{theirs}self_attn.{one}_proj.{leaf}" for one in "qkv")
            links.append(Link(members, f"{ours}attn.in_proj_{leaf}", "fuse"))
    return links


def component(
    prefixes: tuple[str, ...],
    *,
    name: str,
    folder: str,
    penultimate: bool = False,
    alone: bool = False,
) -> Component:
    """An OpenCLIP text encoder component, at these prefixes in single files.

    Args:
        prefixes: in single files, the canonical one first.
        name: part name.
        folder: Diffusers subfolder.
        penultimate: the last layer and the projection are not read (SD2).
        alone: in a file of its own, which may be SD2's, without a projection.
    """
    theirs = (
        "embeddings.token_embedding.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
    )
    ours = (
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.weight",
        "transformer.resblocks.0.attn.in_proj_weight",
    )
    projection = () if penultimate else ("text_projection.weight",)
    towers = ("vision_model.", "visual_projection.")
    return Component(
        name=name,
        kind="openclip_text",
        folder=folder,
        prefixes=prefixes,
        signatures={
            "canonical": Signature(
                ours if penultimate or alone else (*ours, "text_projection"), ("visual.",)
            ),
            "diffusers": Signature((*(f"text_model.{one}" for one in theirs), *projection), towers),
            "alternate": Signature((*theirs, *projection), towers),
        },
        links=partial(_links, penultimate=penultimate),
        facts=text_facts,
        published=published,
        ignored=(
            (r"(^|\.)embeddings\.position_ids$", "0, 1, 2 ...: transformers builds it itself"),
            (r"^attn_mask$", "causal mask, built by the model itself"),
        ),
    )
