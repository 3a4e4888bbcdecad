"""Z-Image (Turbo, base, Omni): the names of single files, with fused attention, are canonical.

Key correspondence: huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_z_image_transformer_checkpoint_to_diffusers. Lumina 2 has the same blocks, but another
width of captions and no pad tokens.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    qwen3_text,
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

__all__ = ["Z_IMAGE"]

_SAME = (
    "cap_embedder",
    "cap_pad_token",
    "x_pad_token",
    "t_embedder",
    "siglip_embedder",
    "siglip_pad_token",
)
_TOP = {"all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1": "final_layer"}
_STACKS = ("layers", "noise_refiner", "context_refiner", "siglip_refiner")
_SAME_IN_BLOCK = (
    "adaLN_modulation",
    "attention_norm1",
    "attention_norm2",
    "feed_forward",
    "ffn_norm1",
    "ffn_norm2",
)
_ATTENTION = {"norm_q": "q_norm", "norm_k": "k_norm", "to_out.0": "out"}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = rename_table({**{one: one for one in _SAME}, **_TOP})
    links.append(Link((), "norm_final", "drop", reason="not read by any model code"))
    for stack in _STACKS:
        for i in range(count(shapes, stack)):
            block = f"{stack}.{i}."
            links += rename_table({one: one for one in _SAME_IN_BLOCK}, block, block)
            inner = f"{block}attention."
            links += rename_table(_ATTENTION, inner, inner)
            members = tuple(f"{inner}to_{one}" for one in "qkv")
            links.append(Link(members, f"{inner}qkv", "fuse"))
    return links


def _facts(shapes: Shapes) -> Facts:
    hidden = width(shapes, "all_x_embedder.2-1.weight", 0)
    head_dim = width(shapes, "layers.0.attention.norm_q.weight", 0)
    patch = width(shapes, "all_x_embedder.2-1.weight", 1)
    return {
        "in_channels": patch // 4 if patch else None,  # patches of 2 x 2
        "dim": hidden,
        "n_layers": count(shapes, "layers"),
        "n_refiner_layers": count(shapes, "noise_refiner"),
        "n_heads": hidden // head_dim if hidden and head_dim else None,
        "cap_feat_dim": width(shapes, "cap_embedder.0.weight", 0),
        "siglip_feat_dim": width(shapes, "siglip_embedder.0.weight", 0),
        "_omni": "siglip_embedder.0.weight" in shapes,
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"
_PADS = "city96/ComfyUI-GGUF@4dfc025:tools/lcpp.patch (branch auto_convert)"
_SDNQ = "Disty0/sdnq@21d60c8:sdnq/common.py:480-585"

Z_IMAGE = Architecture(
    slug="z_image",
    title="Z-Image",
    components=(
        Component(
            name="denoiser",
            kind="z_image",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "x_embedder.weight",
                        "cap_embedder.1.weight",
                        "cap_pad_token",
                        "t_embedder.mlp.0.weight",
                        "layers.0.attention.qkv.weight",
                        "layers.0.feed_forward.w1.weight",
                        "layers.0.adaLN_modulation.0.weight",
                        "noise_refiner.0.attention.k_norm.weight",
                        "final_layer.linear.weight",
                    ),
                    ("control_layers.",),
                ),
                "diffusers": Signature(
                    (
                        "all_x_embedder.2-1.weight",
                        "cap_embedder.1.weight",
                        "cap_pad_token",
                        "t_embedder.mlp.0.weight",
                        "layers.0.attention.to_q.weight",
                        "layers.0.feed_forward.w1.weight",
                        "noise_refiner.0.attention.norm_k.weight",
                        "all_final_layer.2-1.linear.weight",
                    ),
                    ("control_layers.",),
                ),
            },
            links=_links,
            facts=_facts,
        ),
        vae_kl.component(("vae.", "first_stage_model.")),
        qwen3_text.component(("text_encoders.qwen3_4b.transformer.", "text_encoders.qwen3_4b.")),
    ),
    variants=(
        Variant("omni", {"_omni": True}, "an input for SigLIP features: Omni or Edit"),
        Variant(
            "",
            {},
            "Turbo and base have the same names and shapes and cannot be told apart",
        ),
    ),
    keep=(
        Keep(r"^x_embedder\.", "image input, and detection reads its width", _CG),
        Keep(r"^cap_embedder\.", "text input, and detection reads its width", _CG),
        Keep(r"^t_embedder\.", "timestep embedding", _CG, frees=True),
        Keep(
            r"^(context|noise)_refiner\.", "refiner blocks before the first layer", _CG, frees=True
        ),
        Keep(r"^final_layer\.", "output layer", _CG, frees=True),
        Keep(r"^(x|cap|siglip)_pad_token$", "token that fills up", _PADS, table=True),
        Keep(r"^siglip_(embedder|refiner)\.", "input of image features (Omni)", _SDNQ),
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
            9, 1.0, None, "euler", "simple", 1024, 1024, "Z-Image-Turbo, diffusers documentation"
        )
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_z_image.py
        "denoiser": {
            "_class_name": "ZImageTransformer2DModel",
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "norm_eps": 1e-5,
            "qk_norm": True,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": (32, 48, 48),
            "axes_lens": (1024, 512, 512),
        },
        "vae": vae_kl.FLUX1_DEFAULTS,
        "text_encoder": qwen3_text.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    },
)
