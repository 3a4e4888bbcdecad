"""Ideogram 4: the makers' names, with fused attention, are canonical.

Key correspondence: Comfy-Org/ComfyUI@7b30bf3:comfy/ldm/ideogram4/model.py against
huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_ideogram4.py.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    vae_flux2,
)
from diffquant.convert.architectures.base import (
    PREFIXES,
    Architecture,
    Component,
    Facts,
    Family,
    Keep,
    Latent,
    Layout,
    Sampling,
    Signature,
    Variant,
)
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["IDEOGRAM4"]

_SAME = (
    "input_proj",
    "llm_cond_norm",
    "llm_cond_proj",
    "t_embedding",
    "adaln_proj",
    "embed_image_indicator",
    "final_layer",
)
_SAME_IN_BLOCK = (
    "attention.norm_q",
    "attention.norm_k",
    "attention_norm1",
    "attention_norm2",
    "feed_forward",
    "ffn_norm1",
    "ffn_norm2",
    "adaln_modulation",
)


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = rename_table({one: one for one in _SAME})
    for i in range(count(shapes, "layers")):
        block = f"layers.{i}."
        links += rename_table({one: one for one in _SAME_IN_BLOCK}, block, block)
        links.append(Link((f"{block}attention.to_out.0",), f"{block}attention.o"))
        members = tuple(f"{block}attention.to_{one}" for one in "qkv")
        links.append(Link(members, f"{block}attention.qkv", "fuse"))
    return links


def _facts(shapes: Shapes) -> Facts:
    hidden = width(shapes, "input_proj.weight", 0)
    head_dim = width(shapes, "layers.0.attention.norm_q.weight", 0)
    return {
        "in_channels": width(shapes, "input_proj.weight", 1),
        "num_layers": count(shapes, "layers"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim if hidden and head_dim else None,
        "intermediate_size": width(shapes, "layers.0.feed_forward.w1.weight", 0),
        "adaln_dim": width(shapes, "adaln_proj.weight", 0),
        "llm_features_dim": width(shapes, "llm_cond_proj.weight", 1),
    }


_SDNQ = "Disty0/sdnq@21d60c8:sdnq/common.py:480-585"
_BOTH = (
    "input_proj.weight",
    "llm_cond_proj.weight",
    "t_embedding.mlp_in.weight",
    "adaln_proj.weight",
    "embed_image_indicator.weight",
    "layers.0.feed_forward.w1.weight",
    "layers.0.adaln_modulation.weight",
    "final_layer.linear.weight",
)

IDEOGRAM4 = Architecture(
    slug="ideogram4",
    title="Ideogram 4",
    components=(
        Component(
            name="denoiser",
            kind="ideogram4",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature((*_BOTH, "layers.0.attention.qkv.weight")),
                "diffusers": Signature((*_BOTH, "layers.0.attention.to_q.weight")),
            },
            links=_links,
            facts=_facts,
        ),
        vae_flux2.component(("vae.", "first_stage_model.")),
    ),
    variants=(
        Variant(
            "",
            {},
            "an indicator of image tokens; the model for the negative prompt has the same names "
            "and shapes and cannot be told from the other",
        ),
    ),
    keep=(
        Keep(r"^embed_image_indicator\.", "embedding table", _SDNQ, table=True),
        Keep(r"^input_proj\.", "image input", _SDNQ),
        Keep(r"^llm_cond_(norm|proj)\.", "text input", _SDNQ),
        Keep(r"^t_embedding\.", "timestep embedding", _SDNQ),
        Keep(r"^adaln_proj\.", "modulation of every layer", _SDNQ),
        Keep(r"^layers\.0\.adaln_modulation\.", "first layer's modulation", _SDNQ),
        Keep(r"^final_layer\.", "output layer", _SDNQ),
    ),
    families=(
        Family("qkv", r"\.attention\.qkv\.weight$"),
        Family("ffn_down", r"\.feed_forward\.w2\.weight$"),
    ),
    gguf_architecture="ideogram4",
    gguf_prefix="",
    gguf_note=(
        "of the loaders of GGUF files, stable-diffusion.cpp and calcuis/gguf know ideogram4, "
        "ComfyUI-GGUF does not"
    ),
    latent=Latent(32, 8, None, patch=2, space="flux2"),
    sampling={
        "": Sampling(
            48, 7.0, None, "euler", "simple", 1024, 1024, "Ideogram4Pipeline, diffusers 0.42.1"
        )
    },
    hyper_defaults={
        "denoiser": {
            "_class_name": "Ideogram4Transformer2DModel",
            "rope_theta": 5000000,
            "mrope_section": (24, 20, 20),
            "norm_eps": 1e-5,
        },
        "vae": vae_flux2.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
        },
    },
)
