"""Flux.1 (dev, schnell, Fill, Depth, Canny, Kontext): Black Forest Labs names are canonical.

Key correspondence: huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_flux_transformer_checkpoint_to_diffusers; it writes widths down, here they come from shapes.
`final_layer.adaLN_modulation.1` is (shift, scale), Diffusers' `norm_out.linear` (scale, shift).
"""

from __future__ import annotations

from diffquant.convert.architectures import clip_text, t5_encoder, vae_kl
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
from diffquant.convert.architectures.flux_blocks import block_facts, block_links
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import width
from diffquant.convert.rules import Shapes

__all__ = ["FLUX1"]

_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = rename_table(_TOP)
    links.append(Link(("norm_out.linear",), "final_layer.adaLN_modulation.1", "swap"))
    return links + block_links(shapes, layout)


def _facts(shapes: Shapes) -> Facts:
    return {
        **block_facts(shapes),
        "pooled_projection_dim": width(shapes, "time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "_conditioning": _conditioning(shapes),
    }


def _conditioning(shapes: Shapes) -> int:
    """Input channels beyond the output's, in multiples of the output's."""
    got, made = width(shapes, "x_embedder.weight", 1), width(shapes, "proj_out.weight", 0)
    return got // made - 1 if got and made else 0


_DENOISER = Component(
    name="denoiser",
    kind="flux",
    folder="transformer",
    prefixes=PREFIXES,
    signatures={
        "canonical": Signature(
            (
                "img_in.weight",
                "txt_in.weight",
                "time_in.in_layer.weight",
                "vector_in.in_layer.weight",
                "final_layer.linear.weight",
                "final_layer.adaLN_modulation.1.weight",
                "double_blocks.0.img_attn.qkv.weight",
                "double_blocks.0.img_attn.norm.key_norm.scale",
                "double_blocks.0.img_mod.lin.weight",
                "double_blocks.0.img_mlp.0.weight",
                "single_blocks.0.linear1.weight",
                "single_blocks.0.modulation.lin.weight",
            ),
            ("distilled_guidance_layer.", "double_stream_modulation_", "controlnet_", "nerf_"),
        ),
        "diffusers": Signature(
            (
                "x_embedder.weight",
                "context_embedder.weight",
                "time_text_embed.timestep_embedder.linear_1.weight",
                "time_text_embed.text_embedder.linear_1.weight",
                "norm_out.linear.weight",
                "proj_out.weight",
                "transformer_blocks.0.attn.add_q_proj.weight",
                "transformer_blocks.0.attn.norm_q.weight",
                "transformer_blocks.0.norm1.linear.weight",
                "transformer_blocks.0.ff.net.0.proj.weight",
                "single_transformer_blocks.0.proj_mlp.weight",
                "single_transformer_blocks.0.norm.linear.weight",
            ),
            ("distilled_guidance_layer.", "double_stream_modulation_", "controlnet_"),
        ),
    },
    links=_links,
    facts=_facts,
)

_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"

FLUX1 = Architecture(
    slug="flux1",
    title="Flux.1",
    components=(
        _DENOISER,
        vae_kl.component(("vae.", "first_stage_model.")),
        clip_text.component(
            ("text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "clip_l.transformer.")
        ),
        t5_encoder.component(
            ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "t5xxl.transformer."),
            name="text_encoder_2",
        ),
    ),
    variants=(
        Variant("fill", {"_conditioning": 5}, "image input has 6 times the latent channels: Fill"),
        Variant(
            "control",
            {"_conditioning": 1},
            "image input has twice the latent channels: Depth or Canny, which no header tells "
            "apart",
        ),
        Variant(
            "schnell",
            {"guidance_embeds": False, "_conditioning": 0},
            "no guidance embedding: schnell",
        ),
        Variant(
            "dev",
            {"guidance_embeds": True, "_conditioning": 0},
            "guidance embedding present: dev; Kontext and Krea have the same names and shapes and "
            "cannot be told from it",
        ),
        Variant("", {}, "an unlisted member of the family"),
    ),
    keep=(
        Keep(r"^img_in\.", "image input, and detection reads its width", _CG),
        Keep(r"^txt_in\.", "text input, and detection reads its width", _CG),
        Keep(r"^time_in\.", "timestep embedding", _CG, frees=True),
        Keep(r"^vector_in\.", "pooled text embedding, and detection reads its width", _CG),
        Keep(r"^guidance_in\.", "guidance embedding", _CG, frees=True),
        Keep(r"^final_layer\.", "output layer", _CG, frees=True),
    ),
    families=(Family("qkv", r"attn\.qkv\.weight$"),),
    # The peers' names for down projections are those of other models, so that Flux has none:
    # pictures of the demo gain 0.6 dB over the published types at equal bytes (docs/formats.md).
    tuned_families=(Family("ffn_down", r"((img|txt)_mlp\.2|linear2)\.weight$"),),
    gguf_architecture="flux",
    gguf_prefix="",
    latent=vae_kl.FLUX1_LATENT,
    sampling={
        "": Sampling(
            28, 1.0, 3.5, "euler", "simple", 1024, 1024, "FLUX.1-dev model card, FluxPipeline"
        ),
        "fill": Sampling(
            50, 1.0, 30.0, "euler", "simple", 1024, 1024, "FLUX.1-Fill-dev model card"
        ),
        "control": Sampling(
            30, 1.0, 10.0, "euler", "simple", 1024, 1024, "FLUX.1-Depth-dev model card"
        ),
        "schnell": Sampling(
            4, 1.0, None, "euler", "simple", 1024, 1024, "FLUX.1-schnell model card"
        ),
    },
    hyper_defaults={
        # black-forest-labs/FLUX.1-dev: transformer, vae, text_encoder*, scheduler config.json;
        # axes_dims_rope, theta: huggingface/diffusers@58eb52c:
        # src/diffusers/models/transformers/transformer_flux.py
        "denoiser": {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "axes_dims_rope": (16, 56, 56),
            "theta": 10000,
            "eps": 1e-6,
        },
        "vae": vae_kl.FLUX1_DEFAULTS,
        "text_encoder": clip_text.CLIP_L_DEFAULTS,
        "text_encoder_2": t5_encoder.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
    },
    variant_defaults={
        # black-forest-labs/FLUX.1-schnell: scheduler/scheduler_config.json
        "schnell": {"scheduler": {"shift": 1.0, "use_dynamic_shifting": False}},
    },
    pipelines={"FluxKontextPipeline": ("dev", "kontext")},
)
