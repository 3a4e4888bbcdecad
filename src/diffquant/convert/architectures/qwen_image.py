"""Qwen-Image (text to image, Edit, Edit-2509, Layered): Diffusers names are canonical."""

from __future__ import annotations

from diffquant.convert.architectures import qwen2_vl_text, vae_qwen
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
from diffquant.convert.architectures.links import Link
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["QWEN_IMAGE"]

_BLOCK = "transformer_blocks.0"


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    return []


def _facts(shapes: Shapes) -> Facts:
    hidden = width(shapes, "img_in.weight", 0)
    head_dim = width(shapes, f"{_BLOCK}.attn.norm_q.weight", 0)
    made = width(shapes, "proj_out.weight", 0)
    return {
        "in_channels": width(shapes, "img_in.weight", 1),
        "out_channels": made // 4 if made else None,  # patches of 2 x 2
        "num_layers": count(shapes, "transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim if hidden and head_dim else None,
        "joint_attention_dim": width(shapes, "txt_in.weight", 1),
        "use_additional_t_cond": "time_text_embed.addition_t_embedding.weight" in shapes,
        "_patch_channels": made,
    }


_SIGNATURE = Signature(
    (
        "img_in.weight",
        "txt_in.weight",
        "txt_norm.weight",
        "time_text_embed.timestep_embedder.linear_1.weight",
        "norm_out.linear.weight",
        "proj_out.weight",
        f"{_BLOCK}.img_mod.1.weight",
        f"{_BLOCK}.txt_mod.1.weight",
        f"{_BLOCK}.img_mlp.net.0.proj.weight",
        f"{_BLOCK}.attn.add_q_proj.weight",
        f"{_BLOCK}.attn.norm_added_q.weight",
    ),
    ("controlnet_", "txt_in.text_norm.", "modulation."),
)

_CG = "city96/ComfyUI-GGUF@4dfc025:tools/lcpp.patch (branch auto_convert)"
_MARKER = "__index_timestep_zero__"

QWEN_IMAGE = Architecture(
    slug="qwen_image",
    title="Qwen-Image",
    components=(
        Component(
            name="denoiser",
            kind="qwen_image",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={"canonical": _SIGNATURE},
            links=_links,
            facts=_facts,
            where={"_patch_channels": (64,)},  # 16 latent channels, patches of 2 x 2
            same_names=True,
        ),
        vae_qwen.component(("vae.", "first_stage_model.")),
        qwen2_vl_text.component(
            (
                "text_encoders.qwen25_7b.transformer.",
                "text_encoders.qwen25_7b.",
                "text_encoders.qwen2vl.transformer.",
                "text_encoders.llm.",
            )
        ),
    ),
    variants=(
        Variant(
            "layered", {"use_additional_t_cond": True}, "additional timestep condition: Layered"
        ),
        Variant("edit_2511", {}, f"marker key {_MARKER} is there: Edit-2511", keys=(_MARKER,)),
        Variant(
            "",
            {},
            "text to image, Edit and Edit-2509 have the same names and shapes and cannot be told "
            "apart",
        ),
    ),
    keep=(
        Keep(r"^img_in\.", "image input, and detection reads its width", _CG),
        Keep(r"^txt_in\.", "text input, and detection reads its width", _CG),
        Keep(
            r"^time_text_embed\.addition_t_embedding\.",
            "embedding table, which no loader unpacks",
            "huggingface/diffusers@58eb52c:src/diffusers/models/transformers/"
            "transformer_qwenimage.py",
            table=True,
        ),
        Keep(r"^time_text_embed\.", "timestep embedding", _CG, frees=True),
        Keep(r"^proj_out\.", "output layer", _CG, frees=True),
        Keep(r"^norm_out\.", "output modulation", _CG, frees=True),
    ),
    tuned_keep=(
        # Not measured here. Three recipes agree on it: sdnq 0.2.8 common.py:480-585,
        # silveroxides/convert_to_quant@ee83a4d:convert_to_quant/constants.py:125-250 and the one
        # below, of the makers of ComfyUI.
        Keep(
            r"^transformer_blocks\.0\.img_mod\.1\.",
            "first block's modulation: tuned, as the makers of ComfyUI keep it",
            "Comfy-Org/comfy-quants@55f0a26:configs/qwen_image_2512_fp8_static.yaml",
        ),
    ),
    families=(
        Family("v", r"\.(to_v|add_v_proj)\.weight$"),
        Family("ffn_down", r"\.(img|txt)_mlp\.net\.2\.weight$"),
    ),
    gguf_architecture="qwen_image",
    gguf_prefix="",
    latent=Latent(16, 8, None, patch=2, space="wan21"),
    sampling={"": Sampling(50, 4.0, None, "euler", "simple", 1328, 1328, "Qwen-Image model card")},
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_qwenimage.py
        "denoiser": {
            "_class_name": "QwenImageTransformer2DModel",
            "patch_size": 2,
            "guidance_embeds": False,
            "axes_dims_rope": (16, 56, 56),
            "theta": 10000,
            "eps": 1e-6,
            "zero_cond_t": False,
            "use_layer3d_rope": False,
        },
        "vae": vae_qwen.DEFAULTS,
        "text_encoder": qwen2_vl_text.DEFAULTS,
        "scheduler": {
            # Qwen/Qwen-Image: scheduler/scheduler_config.json
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 0.9,
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "shift_terminal": 0.02,
            "time_shift_type": "exponential",
        },
    },
    variant_defaults={
        "layered": {"denoiser": {"use_layer3d_rope": True}},
        "edit_2511": {"denoiser": {"zero_cond_t": True}},
    },
    edge_blocks="transformer_blocks",
    pipelines={
        "QwenImageEditPipeline": ("", "edit"),
        "QwenImageEditPlusPipeline": ("", "edit_plus"),
    },
)
