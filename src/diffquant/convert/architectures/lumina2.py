"""Lumina-Image 2.0: the makers' names, with fused attention, are canonical.

Keys and values have fewer heads than queries, so that the fused rows are unequal; how many follows
from the width of the output projection. Key correspondence:
huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_lumina2_to_diffusers.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    gemma2_text,
    vae_kl,
)
from diffquant.convert.architectures.base import (
    PREFIXES,
    Architecture,
    Component,
    Facts,
    Family,
    Keep,
    Layout,
    Sampling,
    Signature,
    Variant,
)
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["LUMINA2"]

_TOP = {
    "x_embedder": "x_embedder",
    "time_caption_embed.caption_embedder": "cap_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_BLOCK = {
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    "attn.to_out.0": "attention.out",
    "feed_forward.linear_1": "feed_forward.w1",
    "feed_forward.linear_2": "feed_forward.w2",
    "feed_forward.linear_3": "feed_forward.w3",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
    "norm2": "attention_norm2",
}
_MODULATED = {"norm1.norm": "attention_norm1", "norm1.linear": "adaLN_modulation.1"}
_PLAIN = {"norm1": "attention_norm1"}
_STACKS = {"layers": _MODULATED, "noise_refiner": _MODULATED, "context_refiner": _PLAIN}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = rename_table(_TOP)
    links.append(Link((), "norm_final", "drop", reason="not read by any model code"))
    for stack, norms in _STACKS.items():
        for i in range(count(shapes, stack)):
            block = f"{stack}.{i}."
            links += rename_table({**_BLOCK, **norms}, block, block)
            rows = _qkv_rows(shapes, f"{block}attention.") if layout == "canonical" else ()
            members = tuple(f"{block}attn.to_{one}" for one in "qkv")
            links.append(Link(members, f"{block}attention.qkv", "fuse", rows))
    return links


def _qkv_rows(shapes: Shapes, attention: str) -> tuple[int, ...]:
    """Queries are as many as the output projection reads; keys and values share the rest."""
    total = width(shapes, f"{attention}qkv.weight", 0) or 0
    queries = width(shapes, f"{attention}out.weight", 1) or 0
    return (queries, (total - queries) // 2, (total - queries) // 2)


def _facts(shapes: Shapes) -> Facts:
    hidden = width(shapes, "x_embedder.weight", 0)
    head_dim = width(shapes, "layers.0.attn.norm_q.weight", 0)
    pairs = width(shapes, "layers.0.attn.to_k.weight", 0)
    patch = width(shapes, "x_embedder.weight", 1)
    return {
        "in_channels": patch // 4 if patch else None,  # patches of 2 x 2
        "hidden_size": hidden,
        "num_layers": count(shapes, "layers"),
        "num_refiner_layers": count(shapes, "noise_refiner"),
        "num_attention_heads": hidden // head_dim if hidden and head_dim else None,
        "num_kv_heads": pairs // head_dim if pairs and head_dim else None,
        "cap_feat_dim": width(shapes, "time_caption_embed.caption_embedder.0.weight", 0),
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"

LUMINA2 = Architecture(
    slug="lumina2",
    title="Lumina-Image 2.0",
    components=(
        Component(
            name="denoiser",
            kind="lumina2",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "x_embedder.weight",
                        "cap_embedder.1.weight",
                        "t_embedder.mlp.0.weight",
                        "layers.0.attention.qkv.weight",
                        "layers.0.feed_forward.w1.weight",
                        "layers.0.adaLN_modulation.1.weight",
                        "noise_refiner.0.attention.k_norm.weight",
                        "final_layer.linear.weight",
                    ),
                    ("cap_pad_token", "siglip_", "clip_text_pooled_proj.", "dec_net."),
                ),
                "diffusers": Signature(
                    (
                        "x_embedder.weight",
                        "time_caption_embed.caption_embedder.1.weight",
                        "time_caption_embed.timestep_embedder.linear_1.weight",
                        "layers.0.attn.to_q.weight",
                        "layers.0.norm1.linear.weight",
                        "noise_refiner.0.attn.norm_k.weight",
                        "norm_out.linear_2.weight",
                    ),
                    ("ref_image_", "image_index_embedding", "double_stream_layers."),
                ),
            },
            links=_links,
            facts=_facts,
        ),
        vae_kl.component(("vae.", "first_stage_model.")),
        gemma2_text.component(("text_encoders.gemma2_2b.transformer.", "text_encoders.gemma2_2b.")),
    ),
    variants=(Variant("", {}, "captions of Gemma 2, fewer heads for keys than for queries"),),
    keep=(
        Keep(r"^x_embedder\.", "image input, and detection reads its width", _CG),
        Keep(r"^cap_embedder\.", "text input, and detection reads its width", _CG),
        Keep(r"^t_embedder\.", "timestep embedding", _CG),
        Keep(r"^(context|noise)_refiner\.", "refiner blocks before the first layer", _CG),
        Keep(r"^final_layer\.", "output layer", _CG),
    ),
    families=(
        Family("qkv", r"^layers\.\d+\.attention\.qkv\.weight$"),
        Family("ffn_down", r"^layers\.\d+\.feed_forward\.w2\.weight$"),
    ),
    gguf_architecture="lumina2",
    gguf_prefix="",
    latent=vae_kl.FLUX1_LATENT,
    sampling={
        "": Sampling(
            30, 4.0, None, "euler", "simple", 1024, 1024, "Lumina2Pipeline, diffusers 0.42.1"
        )
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_lumina2.py
        "denoiser": {
            "_class_name": "Lumina2Transformer2DModel",
            "patch_size": 2,
            "norm_eps": 1e-5,
            "axes_dim_rope": (32, 32, 32),
            "axes_lens": (300, 512, 512),
        },
        "vae": vae_kl.FLUX1_DEFAULTS,
        "text_encoder": gemma2_text.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 6.0,
        },
    },
)
