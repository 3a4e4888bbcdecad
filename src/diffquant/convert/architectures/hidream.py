"""HiDream-I1 and HiDream-E1 (a mixture of experts), and the pixel-space HiDream-O1.

I1's single files and Diffusers folders have the same names (huggingface/diffusers@58eb52c:
src/diffusers/loaders/single_file_utils.py, convert_hidream_transformer_to_diffusers only removes a
prefix). O1 is a Qwen3-VL with patch embedders (Comfy-Org/ComfyUI@6946073:
comfy/ldm/hidream_o1/model.py); no Diffusers class has it.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    clip_text,
    openclip_text,
    t5_encoder,
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
from diffquant.convert.architectures.links import Link
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["HIDREAM"]

_DOUBLE = "double_stream_blocks.0.block"


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    return []


def _facts(shapes: Shapes) -> Facts:
    patch = width(shapes, "x_embedder.proj.weight", 1)
    return {
        "in_channels": patch // 4 if patch else None,  # patches of 2 x 2
        "num_layers": count(shapes, "double_stream_blocks"),
        "num_single_layers": count(shapes, "single_stream_blocks"),
        "num_routed_experts": count(shapes, f"{_DOUBLE}.ff_i.experts"),
        "text_emb_dim": width(shapes, "p_embedder.pooled_embedder.linear_1.weight", 1),
        "_pixels": False,
    }


def _o1_facts(shapes: Shapes) -> Facts:
    return {
        "num_hidden_layers": count(shapes, "language_model.layers"),
        "hidden_size": width(shapes, "language_model.embed_tokens.weight", 1),
        "_pixels": True,
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"
_SDNQ = "Disty0/sdnq@21d60c8:sdnq/common.py:480-585"
_G = ("text_encoders.clip_g.transformer.", "text_encoders.clip_g.")

HIDREAM = Architecture(
    slug="hidream",
    title="HiDream",
    components=(
        Component(
            name="denoiser",
            kind="hidream",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "x_embedder.proj.weight",
                        "t_embedder.timestep_embedder.linear_1.weight",
                        "p_embedder.pooled_embedder.linear_1.weight",
                        "caption_projection.0.linear.weight",
                        f"{_DOUBLE}.attn1.to_q_t.weight",
                        f"{_DOUBLE}.ff_i.shared_experts.w3.weight",
                        f"{_DOUBLE}.ff_i.gate.weight",
                        "single_stream_blocks.0.block.attn1.to_q.weight",
                        "final_layer.linear.weight",
                    )
                ),
            },
            links=_links,
            facts=_facts,
            same_names=True,
        ),
        Component(
            name="denoiser",
            kind="hidream_o1",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "t_embedder1.mlp.0.weight",
                        "x_embedder.proj1.weight",
                        "x_embedder.proj2.weight",
                        "final_layer2.linear.weight",
                        "language_model.layers.0.self_attn.q_proj.weight",
                    )
                ),
            },
            links=None,
            facts=_o1_facts,
        ),
        vae_kl.component(("vae.", "first_stage_model.")),
        clip_text.component(("text_encoders.clip_l.transformer.", "text_encoders.clip_l.")),
        openclip_text.component(_G, name="text_encoder_2", folder="text_encoder_2"),
        t5_encoder.component(
            ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
            name="text_encoder_3",
            folder="text_encoder_3",
        ),
    ),
    variants=(
        Variant("o1", {"_pixels": True}, "a language model between pixel embedders: HiDream-O1"),
        Variant(
            "i1",
            {},
            "routed experts in both streams: I1; Full, Dev, Fast and E1 have the same names and "
            "shapes and cannot be told apart",
        ),
    ),
    keep=(
        Keep(r"^x_embedder\.", "image input, and detection reads its width", _CG),
        Keep(r"^t_embedder1?\.", "timestep embedding", _CG),
        Keep(r"^p_embedder\.", "pooled text embedding", _CG),
        Keep(r"^caption_projection\.", "text input", _CG),
        Keep(r"\.ff_i\.gate\.weight$", "router of the experts", _CG),
        Keep(r"^final_layer2?\.", "output layer", _CG),
        Keep(r"^img_emb\.emb_pos$", "table of positions", _CG, table=True),
        Keep(r"(^|\.)(embed_tokens|pos_embed)\.weight$", "table (O1)", _SDNQ, table=True),
        Keep(r"(^|\.)(patch_embed|lm_head)\.", "input and output of the language model", _SDNQ),
    ),
    families=(
        Family("v", r"\.attn1\.to_v\.weight$"),
        Family("ffn_down", r"\.ff_i\.(experts\.\d+|shared_experts)\.w2\.weight$"),
    ),
    gguf_architecture="hidream",
    gguf_prefix="",
    gguf_names={"o1": "hidream_o1"},
    latent=vae_kl.FLUX1_LATENT,
    variant_spaces={"o1": ""},
    sampling={
        "": Sampling(
            50, 5.0, None, "unipc", "simple", 1024, 1024, "HiDreamImagePipeline, diffusers 0.42.1"
        )
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:
        # src/diffusers/models/transformers/transformer_hidream_image.py
        "denoiser": {
            "_class_name": "HiDreamImageTransformer2DModel",
            "patch_size": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (64, 32, 32),
            "max_resolution": (128, 128),
        },
        "vae": vae_kl.FLUX1_DEFAULTS,
        "text_encoder": clip_text.CLIP_L_DEFAULTS,
        "text_encoder_2": openclip_text.BIGG_DEFAULTS,
        "text_encoder_3": t5_encoder.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    },
)
