"""OmniGen2: the makers' names, in Diffusers' style, are the only ones."""

from __future__ import annotations

from diffquant.convert.architectures import (
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

__all__ = ["OMNIGEN2"]


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    return []


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
        "text_feat_dim": width(shapes, "time_caption_embed.caption_embedder.0.weight", 0),
    }


# Comfy-Org/ComfyUI@0b61ce5:comfy/model_detection.py, detect_unet_config, for the marks; no tool has
# a list of layers to keep, so this one follows the generic list of the one that has most.
_SDNQ = "Disty0/sdnq@21d60c8:sdnq/common.py:447-475 (any model)"

OMNIGEN2 = Architecture(
    slug="omnigen2",
    title="OmniGen2",
    components=(
        Component(
            name="denoiser",
            kind="omnigen2",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "x_embedder.weight",
                        "ref_image_patch_embedder.weight",
                        "image_index_embedding",
                        "time_caption_embed.timestep_embedder.linear_1.weight",
                        "layers.0.attn.to_q.weight",
                        "layers.0.norm1.linear.weight",
                        "ref_image_refiner.0.attn.to_q.weight",
                        "norm_out.linear_2.weight",
                    )
                ),
            },
            links=_links,
            facts=_facts,
            same_names=True,
        ),
        vae_kl.component(("vae.", "first_stage_model.")),
    ),
    variants=(Variant("", {}, "an embedder of reference images beside the image's own"),),
    keep=(
        Keep(r"^x_embedder\.", "image input, and detection reads its width", _SDNQ),
        Keep(r"^ref_image_patch_embedder\.", "reference image input", _SDNQ),
        Keep(r"^image_index_embedding$", "table of image indexes", _SDNQ, table=True),
        Keep(r"^time_caption_embed\.", "timestep and text input", _SDNQ),
        Keep(r"^norm_out\.", "output modulation and layer", _SDNQ),
    ),
    families=(
        Family("v", r"\.attn\.to_v\.weight$"),
        Family("ffn_down", r"\.feed_forward\.linear_2\.weight$"),
    ),
    gguf_architecture="omnigen2",
    gguf_prefix="",
    gguf_note="no published loader of GGUF files knows general.architecture omnigen2",
    latent=vae_kl.FLUX1_LATENT,
    sampling={
        "": Sampling(50, 5.0, None, "euler", "simple", 1024, 1024, "OmniGen2 model card (steps)")
    },
    hyper_defaults={
        "denoiser": {"_class_name": "OmniGen2Transformer2DModel", "patch_size": 2},
        "vae": vae_kl.FLUX1_DEFAULTS,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    },
)
