"""PixArt-alpha and PixArt-sigma: the makers' names are canonical.

Fused queries, keys and values; `y_embedder.y_embedding`, the caption of nothing, has no place in
Diffusers. Key correspondence: huggingface/diffusers@58eb52c:
scripts/convert_pixart_sigma_to_diffusers.py, convert_pixart_alpha_to_diffusers.py.
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
    Latent,
    Layout,
    Sampling,
    Signature,
    Variant,
)
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["PIXART"]

_EMB = "adaln_single.emb."
_TOP = {
    "pos_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    f"{_EMB}timestep_embedder.linear_1": "t_embedder.mlp.0",
    f"{_EMB}timestep_embedder.linear_2": "t_embedder.mlp.2",
    f"{_EMB}resolution_embedder.linear_1": "csize_embedder.mlp.0",
    f"{_EMB}resolution_embedder.linear_2": "csize_embedder.mlp.2",
    f"{_EMB}aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    f"{_EMB}aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "proj_out": "final_layer.linear",
    "scale_shift_table": "final_layer.scale_shift_table",
}
_BLOCK = {
    "scale_shift_table": "scale_shift_table",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_FUSED: dict[tuple[str, ...], str] = {
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"): "attn.qkv",
    ("attn2.to_k", "attn2.to_v"): "cross_attn.kv_linear",
}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = rename_table(_TOP)
    links.append(Link((), "y_embedder.y_embedding", "drop", reason="Diffusers encodes no text"))
    links.append(Link((), "pos_embed", "drop", reason="sines and cosines, built by the model"))
    for i in range(count(shapes, "blocks" if layout == "canonical" else "transformer_blocks")):
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        links += rename_table(_BLOCK, theirs, ours)
        links += [
            Link(tuple(theirs + one for one in members), ours + fused, "fuse")
            for members, fused in _FUSED.items()
        ]
    return links


def _facts(shapes: Shapes) -> Facts:
    patch = width(shapes, "pos_embed.proj.weight", 2)
    made = width(shapes, "proj_out.weight", 0)
    channels = width(shapes, "pos_embed.proj.weight", 1)
    sized = f"{_EMB}resolution_embedder.linear_1.weight" in shapes
    return {
        "in_channels": channels,
        "out_channels": made // patch**2 if made and patch else None,
        "patch_size": patch,
        "num_layers": count(shapes, "transformer_blocks"),
        "caption_channels": width(shapes, "caption_projection.linear_1.weight", 1),
        "cross_attention_dim": width(shapes, "transformer_blocks.0.attn2.to_k.weight", 1),
        "use_additional_conditions": sized,
        "_sized": sized,
        "_variance": bool(made and patch and made // patch**2 == 2 * (channels or 0)),
    }


_CASTS = (
    "huggingface/diffusers@58eb52c:src/diffusers/models/transformers/pixart_transformer_2d.py:82 "
    "(layerwise casting)"
)
_SDNQ = "Disty0/sdnq@21d60c8:sdnq/common.py:447-475 (any model)"

PIXART = Architecture(
    slug="pixart",
    title="PixArt",
    components=(
        Component(
            name="denoiser",
            kind="pixart",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "x_embedder.proj.weight",
                        "t_embedder.mlp.0.weight",
                        "t_block.1.weight",
                        "y_embedder.y_proj.fc1.weight",
                        "blocks.0.attn.qkv.weight",
                        "blocks.0.cross_attn.kv_linear.weight",
                        "blocks.0.scale_shift_table",
                        "final_layer.linear.weight",
                    ),
                    ("controlnet.",),
                ),
                "diffusers": Signature(
                    (
                        "pos_embed.proj.weight",
                        "adaln_single.linear.weight",
                        f"{_EMB}timestep_embedder.linear_1.weight",
                        "caption_projection.linear_1.weight",
                        "transformer_blocks.0.attn1.to_q.weight",
                        "transformer_blocks.0.attn2.to_q.weight",
                        "transformer_blocks.0.scale_shift_table",
                        "proj_out.weight",
                    ),
                    ("controlnet.", "patchify_proj."),
                ),
            },
            links=_links,
            facts=_facts,
            where={"_variance": (True,)},  # Allegro has the names of PixArt, and predicts none
        ),
        vae_kl.component(("vae.", "first_stage_model.")),
        t5_encoder.component(
            ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."), folder="text_encoder"
        ),
    ),
    variants=(
        Variant(
            "alpha", {"_sized": True}, "embedders of size and aspect ratio: PixArt-alpha at 1024"
        ),
        Variant(
            "sigma",
            {},
            "no embedder of sizes: PixArt-sigma; PixArt-alpha at 512 and 256 has the same names "
            "and shapes (120 tokens of an empty caption instead of 300, where it is there)",
        ),
    ),
    keep=(
        Keep(r"^x_embedder\.", "image input", _CASTS),
        Keep(r"^t_embedder\.", "timestep embedding", _CASTS),
        Keep(r"^(csize|ar)_embedder\.", "size and aspect ratio", _CASTS),
        Keep(r"^t_block\.", "modulation of every block", _CASTS),
        Keep(r"^y_embedder\.y_embedding$", "empty caption", _SDNQ, table=True),
        Keep(r"^y_embedder\.", "text input", _SDNQ),
        Keep(r"scale_shift_table$", "modulation table", _CASTS, table=True),
        Keep(r"^pos_embed$", "table of positions", _CASTS, table=True),
        Keep(r"^final_layer\.", "output layer", _SDNQ),
    ),
    families=(
        Family("qkv", r"\.attn\.qkv\.weight$"),
        Family("ffn_down", r"\.mlp\.fc2\.weight$"),
    ),
    gguf_architecture="pixart",
    gguf_prefix="",
    gguf_note="of the loaders of GGUF files, calcuis/gguf alone knows general.architecture pixart",
    latent=Latent(4, 8, 0.13025, patch=2, space="sdxl"),
    variant_spaces={"alpha": "sd"},  # PixArt-alpha/PixArt-XL-2-1024-MS: vae/config.json
    sampling={
        "": Sampling(
            20, 4.5, None, "dpmpp_2m", "normal", 1024, 1024, "PixArtSigmaPipeline, diffusers 0.42.1"
        )
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/pixart_transformer_2d.py
        "denoiser": {
            "_class_name": "PixArtTransformer2DModel",
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "sample_size": 128,
            "norm_type": "ada_norm_single",
            "norm_eps": 1e-6,
        },
        "vae": vae_kl.SDXL_DEFAULTS,
        "text_encoder": t5_encoder.DEFAULTS,
        "scheduler": {
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
        },
    },
    variant_defaults={
        "alpha": {"vae": {"sample_size": 512, "scaling_factor": 0.18215}},
    },
)
