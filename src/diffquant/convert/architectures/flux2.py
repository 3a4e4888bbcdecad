"""Flux.2 (dev, klein): Black Forest Labs names are canonical.

Modulation is shared by all blocks of a kind. Key correspondence:
huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_flux2_transformer_checkpoint_to_diffusers. The final modulation is (shift, scale) here,
(scale, shift) there.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    mistral_text,
    qwen3_text,
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

__all__ = ["FLUX2"]

_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}
_QKV: dict[tuple[str, ...], str] = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn.qkv",
}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    canonical = layout == "canonical"
    links = rename_table(_TOP)
    links.append(Link(("norm_out.linear",), "final_layer.adaLN_modulation.1", "swap"))
    for i in range(count(shapes, "double_blocks" if canonical else "transformer_blocks")):
        ours, theirs = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        links += rename_table(_DOUBLE, theirs, ours)
        links += [
            Link(tuple(theirs + one for one in members), ours + fused, "fuse")
            for members, fused in _QKV.items()
        ]
    for i in range(count(shapes, "single_blocks" if canonical else "single_transformer_blocks")):
        links += rename_table(_SINGLE, f"single_transformer_blocks.{i}.", f"single_blocks.{i}.")
    return links


def _facts(shapes: Shapes) -> Facts:
    hidden = width(shapes, "x_embedder.weight", 0)
    head_dim = width(shapes, "transformer_blocks.0.attn.norm_q.weight", 0)
    inner = width(shapes, "transformer_blocks.0.ff.linear_out.weight", 1)
    return {
        "in_channels": width(shapes, "x_embedder.weight", 1),
        "num_layers": count(shapes, "transformer_blocks"),
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim if hidden and head_dim else None,
        "joint_attention_dim": width(shapes, "context_embedder.weight", 1),
        "mlp_ratio": inner / hidden if hidden and inner else None,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
    }


_CG = "city96/ComfyUI-GGUF@4dfc025:tools/lcpp.patch (branch auto_convert)"
_SINGLES = "the single blocks' modulation, shared by all of them"

FLUX2 = Architecture(
    slug="flux2",
    title="Flux.2",
    components=(
        Component(
            name="denoiser",
            kind="flux2",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "img_in.weight",
                        "txt_in.weight",
                        "time_in.in_layer.weight",
                        "double_stream_modulation_img.lin.weight",
                        "single_stream_modulation.lin.weight",
                        "final_layer.linear.weight",
                        "double_blocks.0.img_attn.qkv.weight",
                        "double_blocks.0.img_attn.norm.key_norm.scale",
                        "single_blocks.0.linear1.weight",
                    ),
                    ("controlnet_",),
                ),
                "diffusers": Signature(
                    (
                        "x_embedder.weight",
                        "context_embedder.weight",
                        "time_guidance_embed.timestep_embedder.linear_1.weight",
                        "double_stream_modulation_img.linear.weight",
                        "single_stream_modulation.linear.weight",
                        "norm_out.linear.weight",
                        "proj_out.weight",
                        "transformer_blocks.0.attn.add_q_proj.weight",
                        "transformer_blocks.0.ff.linear_in.weight",
                        "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight",
                    ),
                    ("controlnet_",),
                ),
            },
            links=_links,
            facts=_facts,
        ),
        vae_flux2.component(("vae.", "first_stage_model.")),
        mistral_text.component(("text_encoders.mistral3_24b.transformer.",)),
        qwen3_text.component(
            (
                "text_encoders.qwen3_4b.transformer.",
                "text_encoders.qwen3_8b.transformer.",
            )
        ),
    ),
    variants=(
        Variant(
            "dev",
            {"joint_attention_dim": 15360},
            "text input of three Mistral 3 layers (15360): dev; dev-Turbo has the same names and "
            "shapes",
        ),
        Variant(
            "klein_4b",
            {"joint_attention_dim": 7680},
            "text input of three Qwen3-4B layers (7680): klein 4B; distilled and base cannot be "
            "told apart",
        ),
        Variant(
            "klein_9b",
            {"joint_attention_dim": 12288},
            "text input of three Qwen3-8B layers (12288): klein 9B; distilled and base cannot be "
            "told apart",
        ),
        Variant("", {}, "an unlisted member of the family"),
    ),
    keep=(
        Keep(r"^img_in\.", "image input, and detection reads its width", _CG),
        Keep(r"^txt_in\.", "text input, and detection reads its width", _CG),
        Keep(r"^time_in\.", "timestep embedding", _CG, frees=True),
        Keep(r"^guidance_in\.", "guidance embedding", _CG, frees=True),
        Keep(
            r"^double_stream_modulation_",
            "the double blocks' modulation, shared by all",
            _CG,
            frees=True,
        ),
        Keep(r"^single_stream_modulation\.", _SINGLES, _CG, frees=True),
        Keep(r"^final_layer\.", "output layer", _CG, frees=True),
    ),
    families=(Family("qkv", r"attn\.qkv\.weight$"),),
    gguf_architecture="flux",
    gguf_prefix="",
    latent=Latent(32, 8, None, patch=2, space="flux2"),
    sampling={
        "": Sampling(
            50, 1.0, 4.0, "euler", "simple", 1024, 1024, "Flux2Pipeline, diffusers 0.42.1"
        ),
        "klein_4b": Sampling(
            4, 1.0, None, "euler", "simple", 1024, 1024, "FLUX.2-klein-4B model card (distilled)"
        ),
        "klein_9b": Sampling(
            4, 1.0, None, "euler", "simple", 1024, 1024, "FLUX.2-klein-9B model card (distilled)"
        ),
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_flux2.py
        "denoiser": {
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "axes_dims_rope": (32, 32, 32, 32),
            "rope_theta": 2000,
            "timestep_guidance_channels": 256,
            "eps": 1e-6,
        },
        "vae": vae_flux2.DEFAULTS,
        "text_encoder": {},
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": True,
        },
    },
    # dev's encoder has an image tower, of which nothing here states a config.
    variant_defaults={
        name: {"text_encoder": qwen3_text.DEFAULTS} for name in ("klein_4b", "klein_9b")
    },
)
