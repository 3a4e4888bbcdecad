"""AuraFlow: the makers' names are canonical.

In the double blocks `w1*` belong to the text and `w2*` to the image. Key correspondence:
huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_auraflow_transformer_checkpoint_to_diffusers.
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

__all__ = ["AURAFLOW"]

_TOP = {
    "register_tokens": "register_tokens",
    "pos_embed.pos_embed": "positional_encoding",
    "pos_embed.proj": "init_x_linear",
    "context_embedder": "cond_seq_linear",
    "time_step_proj.linear_1": "t_embedder.mlp.0",
    "time_step_proj.linear_2": "t_embedder.mlp.2",
    "proj_out": "final_linear",
}
_MLP = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
_DOUBLE = {
    "norm1.linear": "modX.1",
    "norm1_context.linear": "modC.1",
    "attn.add_q_proj": "attn.w1q",
    "attn.add_k_proj": "attn.w1k",
    "attn.add_v_proj": "attn.w1v",
    "attn.to_add_out": "attn.w1o",
    "attn.to_q": "attn.w2q",
    "attn.to_k": "attn.w2k",
    "attn.to_v": "attn.w2v",
    "attn.to_out.0": "attn.w2o",
    **{f"ff.{a}": f"mlpX.{b}" for a, b in _MLP.items()},
    **{f"ff_context.{a}": f"mlpC.{b}" for a, b in _MLP.items()},
}
_SINGLE = {
    "norm1.linear": "modCX.1",
    "attn.to_q": "attn.w1q",
    "attn.to_k": "attn.w1k",
    "attn.to_v": "attn.w1v",
    "attn.to_out.0": "attn.w1o",
    **{f"ff.{a}": f"mlp.{b}" for a, b in _MLP.items()},
}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    canonical = layout == "canonical"
    links = rename_table(_TOP)
    links.append(Link(("norm_out.linear",), "modF.1", "swap"))
    for i in range(count(shapes, "double_layers" if canonical else "joint_transformer_blocks")):
        links += rename_table(_DOUBLE, f"joint_transformer_blocks.{i}.", f"double_layers.{i}.")
    for i in range(count(shapes, "single_layers" if canonical else "single_transformer_blocks")):
        links += rename_table(_SINGLE, f"single_transformer_blocks.{i}.", f"single_layers.{i}.")
    return links


def _facts(shapes: Shapes) -> Facts:
    patch = width(shapes, "pos_embed.proj.weight", 1)
    return {
        "in_channels": patch // 4 if patch else None,  # patches of 2 x 2
        "num_mmdit_layers": count(shapes, "joint_transformer_blocks"),
        "num_single_dit_layers": count(shapes, "single_transformer_blocks"),
        "joint_attention_dim": width(shapes, "context_embedder.weight", 1),
        "caption_projection_dim": width(shapes, "context_embedder.weight", 0),
        "pos_embed_max_size": width(shapes, "pos_embed.pos_embed", -2),
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"

AURAFLOW = Architecture(
    slug="auraflow",
    title="AuraFlow",
    components=(
        Component(
            name="denoiser",
            kind="auraflow",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "init_x_linear.weight",
                        "cond_seq_linear.weight",
                        "positional_encoding",
                        "register_tokens",
                        "t_embedder.mlp.0.weight",
                        "double_layers.0.attn.w1q.weight",
                        "double_layers.0.modX.1.weight",
                        "single_layers.0.attn.w1q.weight",
                        "final_linear.weight",
                    )
                ),
                "diffusers": Signature(
                    (
                        "pos_embed.pos_embed",
                        "pos_embed.proj.weight",
                        "register_tokens",
                        "context_embedder.weight",
                        "time_step_proj.linear_1.weight",
                        "joint_transformer_blocks.0.ff_context.out_projection.weight",
                        "single_transformer_blocks.0.ff.linear_1.weight",
                        "norm_out.linear.weight",
                        "proj_out.weight",
                    )
                ),
            },
            links=_links,
            facts=_facts,
        ),
        vae_kl.component(("vae.", "first_stage_model.")),
        t5_encoder.component(
            ("text_encoders.pile_t5xl.transformer.", "text_encoders.pile_t5xl."),
            folder="text_encoder",
        ),
    ),
    variants=(
        Variant(
            "v0.3",
            {"pos_embed_max_size": 9216},
            "a table of 96 x 96 positions: v0.3, or a fine-tune of it such as Pony v7",
        ),
        Variant("", {}, "v0.1 and v0.2 cannot be told apart"),
    ),
    keep=(
        Keep(r"^positional_encoding$", "table of positions", _CG, table=True),
        Keep(r"^register_tokens$", "tokens of no picture", _CG, table=True),
        Keep(r"^t_embedder\.", "timestep embedding", _CG),
        Keep(r"^init_x_linear\.", "image input", _CG),
        Keep(r"^cond_seq_linear\.weight$", "text input", _CG),
        Keep(r"^modF\.1\.weight$", "output modulation", _CG),
        Keep(r"^final_linear\.weight$", "output layer", _CG),
    ),
    families=(Family("v", r"\.attn\.w[12]v\.weight$"),),
    gguf_architecture="aura",
    gguf_prefix="",
    latent=Latent(4, 8, 0.13025, patch=2, space="sdxl"),
    sampling={
        "": Sampling(
            50, 3.5, None, "euler", "simple", 1024, 1024, "AuraFlowPipeline, diffusers 0.42.1"
        )
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/auraflow_transformer_2d.py
        "denoiser": {
            "_class_name": "AuraFlowTransformer2DModel",
            "patch_size": 2,
            "sample_size": 64,
            "attention_head_dim": 256,
        },
        "vae": vae_kl.SDXL_DEFAULTS,
        "text_encoder": t5_encoder.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 1.73,
        },
    },
)
