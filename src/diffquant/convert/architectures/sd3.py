"""Stable Diffusion 3 and 3.5: Stability's names are canonical.

Key correspondence: huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_sd3_transformer_checkpoint_to_diffusers. Modulations that end a stream are (shift, scale)
here and (scale, shift) there: the output's, and the last block's for the text.
"""

from __future__ import annotations

from diffquant.convert.architectures import clip_text, openclip_text, t5_encoder, vae_kl
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
from diffquant.convert.architectures.names import USUAL, count, usual_heads, width
from diffquant.convert.rules import Shapes

__all__ = ["SD3"]

_TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_QKV: dict[tuple[str, ...], str] = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    blocks = count(shapes, "joint_blocks" if layout == "canonical" else "transformer_blocks")
    links = rename_table(_TOP)
    links.append(Link(("norm_out.linear",), "final_layer.adaLN_modulation.1", "swap"))
    for i in range(blocks):
        ours, theirs = f"joint_blocks.{i}.", f"transformer_blocks.{i}."
        links += rename_table(_BLOCK, theirs, ours)
        links += [
            Link(tuple(theirs + one for one in members), ours + fused, "fuse")
            for members, fused in _QKV.items()
        ]
        context = f"{ours}context_block.adaLN_modulation.1"
        last = i == blocks - 1
        links.append(
            Link((f"{theirs}norm1_context.linear",), context, "swap" if last else "rename")
        )
    return links


def _facts(shapes: Shapes) -> Facts:
    hidden = width(shapes, "pos_embed.proj.weight", 0)
    positions = width(shapes, "pos_embed.pos_embed", -2)
    patch = width(shapes, "pos_embed.proj.weight", 2)
    made = width(shapes, "proj_out.weight", 0)
    layers = count(shapes, "transformer_blocks")
    dual = tuple(i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes)
    normed = "transformer_blocks.0.attn.norm_q.weight" in shapes
    return {
        "in_channels": width(shapes, "pos_embed.proj.weight", 1),
        "out_channels": made // patch**2 if made and patch else None,
        "patch_size": patch,
        "num_layers": layers,
        USUAL: usual_heads(hidden, 64),
        "caption_projection_dim": width(shapes, "context_embedder.weight", 0),
        "joint_attention_dim": width(shapes, "context_embedder.weight", 1),
        "pooled_projection_dim": width(shapes, "time_text_embed.text_embedder.linear_1.weight", 1),
        "pos_embed_max_size": round(positions**0.5) if positions else None,
        "qk_norm": "rms_norm" if normed else None,
        "dual_attention_layers": dual,
        "_dual": bool(dual),
        "_normed": normed,
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"
_T5 = ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.")
_G = ("text_encoders.clip_g.transformer.", "text_encoders.clip_g.")
_L = ("text_encoders.clip_l.transformer.", "text_encoders.clip_l.")

SD3 = Architecture(
    slug="sd3",
    title="Stable Diffusion 3",
    components=(
        Component(
            name="denoiser",
            kind="sd3",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "x_embedder.proj.weight",
                        "context_embedder.weight",
                        "t_embedder.mlp.0.weight",
                        "y_embedder.mlp.0.weight",
                        "joint_blocks.0.context_block.attn.qkv.weight",
                        "joint_blocks.0.x_block.attn.qkv.weight",
                        "joint_blocks.0.x_block.mlp.fc1.weight",
                        "final_layer.linear.weight",
                    ),
                    ("controlnet_", "pos_embed_input."),
                ),
                "diffusers": Signature(
                    (
                        "pos_embed.proj.weight",
                        "context_embedder.weight",
                        "time_text_embed.timestep_embedder.linear_1.weight",
                        "time_text_embed.text_embedder.linear_1.weight",
                        "transformer_blocks.0.attn.add_q_proj.weight",
                        "transformer_blocks.0.norm1_context.linear.weight",
                        "transformer_blocks.0.ff.net.0.proj.weight",
                        "norm_out.linear.weight",
                        "proj_out.weight",
                    ),
                    ("controlnet_", "pos_embed_input.", "single_transformer_blocks."),
                ),
            },
            links=_links,
            facts=_facts,
        ),
        vae_kl.component(("first_stage_model.", "vae.")),
        clip_text.component(_L),
        openclip_text.component(_G, name="text_encoder_2", folder="text_encoder_2"),
        t5_encoder.component(_T5, name="text_encoder_3", folder="text_encoder_3"),
    ),
    variants=(
        Variant(
            "3.5_medium",
            {"_dual": True},
            "a second attention in the first blocks: SD 3.5 Medium",
        ),
        Variant(
            "3.5_large",
            {"_normed": True, "_dual": False},
            "normed queries and keys: SD 3.5 Large; Large Turbo has the same names and shapes and "
            "cannot be told from it",
        ),
        Variant("medium", {"_normed": False}, "queries and keys without norm: SD 3 Medium"),
        Variant("", {}, "an unlisted member of the family"),
    ),
    keep=(
        Keep(r"^pos_embed$", "table of positions", _CG, table=True),
        Keep(r"^x_embedder\.", "image input, and detection reads its width", _CG),
        Keep(r"^context_embedder\.", "text input", _CG),
        Keep(r"^t_embedder\.", "timestep embedding", _CG, frees=True),
        Keep(r"^y_embedder\.", "pooled text embedding", _CG),
        Keep(r"^final_layer\.", "output layer", _CG, frees=True),
    ),
    families=(Family("qkv", r"\.attn2?\.qkv\.weight$"),),
    gguf_architecture="sd3",
    gguf_prefix="",
    latent=Latent(16, 8, 1.5305, 0.0609, patch=2, space="sd3"),
    sampling={
        "": Sampling(
            28, 7.0, None, "euler", "simple", 1024, 1024, "SD3-medium model card (steps, scale)"
        ),
        "3.5_medium": Sampling(
            40, 4.5, None, "euler", "simple", 1024, 1024, "SD3.5-medium model card"
        ),
        "3.5_large": Sampling(
            28, 3.5, None, "euler", "simple", 1024, 1024, "SD3.5-large model card"
        ),
    },
    hyper_defaults={
        # stabilityai/stable-diffusion-3-medium-diffusers: config.json of each part
        "denoiser": {"_class_name": "SD3Transformer2DModel", "sample_size": 128},
        "vae": {
            **vae_kl.DEFAULTS,
            "latent_channels": 16,
            "sample_size": 1024,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text_encoder": {
            **clip_text.CLIP_L_DEFAULTS,
            "architectures": ("CLIPTextModelWithProjection",),
        },
        "text_encoder_2": openclip_text.BIGG_DEFAULTS,
        "text_encoder_3": t5_encoder.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    },
)
