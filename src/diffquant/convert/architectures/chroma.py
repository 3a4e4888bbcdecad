"""Chroma, and its pixel-space member Radiance: the makers' names are canonical.

Flux.1's blocks without modulation layers: `distilled_guidance_layer` computes every modulation.
Key correspondence: huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_chroma_transformer_checkpoint_to_diffusers. Radiance has no Diffusers class.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
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
from diffquant.convert.architectures.flux_blocks import block_facts, block_links
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["CHROMA"]

_GUIDE = "distilled_guidance_layer"
_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    f"{_GUIDE}.in_proj": f"{_GUIDE}.in_proj",
    f"{_GUIDE}.out_proj": f"{_GUIDE}.out_proj",
}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = rename_table(_TOP) + block_links(shapes, layout)
    for i in range(count(shapes, f"{_GUIDE}.layers")):
        links += rename_table(
            {"linear_1": "in_layer", "linear_2": "out_layer"},
            f"{_GUIDE}.layers.{i}.",
            f"{_GUIDE}.layers.{i}.",
        )
        links.append(Link((f"{_GUIDE}.norms.{i}.weight",), f"{_GUIDE}.norms.{i}.scale"))
    return links


def _facts(shapes: Shapes) -> Facts:
    return {
        **block_facts(shapes),
        "approximator_num_channels": width(shapes, f"{_GUIDE}.in_proj.weight", 1),
        "approximator_hidden_dim": width(shapes, f"{_GUIDE}.in_proj.weight", 0),
        "approximator_layers": count(shapes, f"{_GUIDE}.layers"),
        "_pixels": False,
    }


def _radiance_facts(shapes: Shapes) -> Facts:
    return {
        "num_layers": count(shapes, "double_blocks"),
        "num_single_layers": count(shapes, "single_blocks"),
        "joint_attention_dim": width(shapes, "txt_in.weight", 1),
        "patch_size": width(shapes, "img_in_patch.weight", 2),
        "_pixels": True,
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"
_CTQ = "silveroxides/convert_to_quant@ee83a4d:convert_to_quant/constants.py:125-250"
_BLOCKS = (
    "txt_in.weight",
    f"{_GUIDE}.in_proj.weight",
    f"{_GUIDE}.out_proj.weight",
    "double_blocks.0.img_attn.qkv.weight",
    "double_blocks.0.img_attn.norm.key_norm.scale",
    "single_blocks.0.linear1.weight",
)

CHROMA = Architecture(
    slug="chroma",
    title="Chroma",
    components=(
        Component(
            name="denoiser",
            kind="chroma",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    ("img_in.weight", "final_layer.linear.weight", *_BLOCKS), ("controlnet_",)
                ),
                "diffusers": Signature(
                    (
                        "x_embedder.weight",
                        "context_embedder.weight",
                        "proj_out.weight",
                        f"{_GUIDE}.in_proj.weight",
                        f"{_GUIDE}.out_proj.weight",
                        "transformer_blocks.0.attn.add_q_proj.weight",
                        "transformer_blocks.0.ff.net.0.proj.weight",
                        "single_transformer_blocks.0.proj_mlp.weight",
                    ),
                    ("controlnet_",),
                ),
            },
            links=_links,
            facts=_facts,
        ),
        Component(
            name="denoiser",
            kind="chroma_radiance",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "img_in_patch.weight",
                        "nerf_image_embedder.embedder.0.weight",
                        *_BLOCKS,
                    )
                ),
            },
            links=None,
            facts=_radiance_facts,
        ),
        vae_kl.component(("vae.", "first_stage_model.")),
        t5_encoder.component(
            ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."), folder="text_encoder"
        ),
    ),
    variants=(
        Variant(
            "radiance",
            {"_pixels": True},
            "patches of pixels in, nerf blocks out: Radiance; only these names are known",
        ),
        Variant(
            "", {}, "modulation from a guidance layer; HD, Flash and base cannot be told apart"
        ),
    ),
    keep=(
        Keep(r"^img_in\.", "image input, and detection reads its width", _CG),
        Keep(r"^txt_in\.", "text input, and detection reads its width", _CG),
        Keep(r"^final_layer\.", "output layer", _CG),
        Keep(r"^distilled_guidance_layer\.", "computes every modulation", _CTQ),
        Keep(r"^img_in_patch\.", "pixel input (Radiance)", _CTQ),
        Keep(r"^nerf_(blocks|image_embedder|final_layer\w*)\.", "pixel output (Radiance)", _CTQ),
        Keep(r"^__x0__$", "marker", _CTQ),
    ),
    families=(Family("qkv", r"attn\.qkv\.weight$"),),
    gguf_architecture="flux",
    gguf_prefix="",
    latent=vae_kl.FLUX1_LATENT,
    variant_spaces={"radiance": ""},
    sampling={
        "": Sampling(
            35, 5.0, None, "euler", "simple", 1024, 1024, "ChromaPipeline, diffusers 0.42.1"
        )
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_chroma.py;
        # lodestones/Chroma: vae, scheduler config.json
        "denoiser": {
            "_class_name": "ChromaTransformer2DModel",
            "patch_size": 1,
            "axes_dims_rope": (16, 56, 56),
        },
        "vae": vae_kl.FLUX1_DEFAULTS,
        "text_encoder": t5_encoder.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "use_dynamic_shifting": False,
        },
    },
)
