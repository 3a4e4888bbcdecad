"""Anima: Cosmos-Predict2's blocks and an adapter that turns Qwen3's features into T5's.

Only the makers' names are known (Comfy-Org/ComfyUI@10ca04d:comfy/ldm/anima/model.py,
comfy/ldm/cosmos/predict2.py); Diffusers has no class for the adapter.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    qwen3_text,
    vae_qwen,
)
from diffquant.convert.architectures.base import (
    PREFIXES,
    Architecture,
    Component,
    Facts,
    Family,
    Keep,
    Latent,
    Sampling,
    Signature,
    Variant,
)
from diffquant.convert.architectures.names import count, width
from diffquant.convert.rules import Shapes

__all__ = ["ANIMA"]


def _facts(shapes: Shapes) -> Facts:
    return {
        "num_layers": count(shapes, "blocks"),
        "hidden_size": width(shapes, "x_embedder.proj.1.weight", 0),
        "adapter_layers": count(shapes, "llm_adapter.blocks"),
        "vocab_size": width(shapes, "llm_adapter.embed.weight", 0),
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425 (cosmos)"
_CTQ = "silveroxides/convert_to_quant@ee83a4d:convert_to_quant/constants.py, --anima"

ANIMA = Architecture(
    slug="anima",
    title="Anima",
    components=(
        Component(
            name="denoiser",
            kind="anima",
            folder="transformer",
            prefixes=("net.", *(one for one in PREFIXES if one != "net.")),
            signatures={
                "canonical": Signature(
                    (
                        "x_embedder.proj.1.weight",
                        "t_embedder.1.linear_1.weight",
                        "blocks.0.mlp.layer1.weight",
                        "blocks.0.self_attn.q_proj.weight",
                        "blocks.0.adaln_modulation_mlp.1.weight",
                        "llm_adapter.blocks.0.cross_attn.q_proj.weight",
                        "final_layer.linear.weight",
                    )
                ),
            },
            links=None,
            facts=_facts,
        ),
        vae_qwen.component(("vae.", "first_stage_model.")),
        qwen3_text.component(("text_encoders.qwen3_06b.transformer.", "text_encoders.qwen3_06b.")),
    ),
    variants=(Variant("", {}, "Cosmos-Predict2's blocks and an llm_adapter"),),
    keep=(
        Keep(r"^x_embedder\.", "image input", _CG),
        Keep(r"^t_embedder\.", "timestep embedding", _CG),
        Keep(r"^t_embedding_norm\.", "timestep embedding", _CG),
        Keep(r"^pos_embedder\.", "table of positions", _CG, table=True),
        Keep(r"^llm_adapter\.embed\.weight$", "embedding table", _CTQ, table=True),
        Keep(r"^llm_adapter\.", "turns the text encoder's features into the model's", _CTQ),
        Keep(r"^final_layer\.", "output layer", _CG),
    ),
    families=(
        Family("v", r"^blocks\.\d+\.(self|cross)_attn\.v_proj\.weight$"),
        Family("ffn_down", r"^blocks\.\d+\.(mlp\.layer2|adaln_modulation_mlp\.2)\.weight$"),
    ),
    gguf_architecture="cosmos",
    gguf_prefix="",
    latent=Latent(16, 8, None, patch=2, space="wan21"),
    sampling={
        "": Sampling(
            32,
            4.0,
            None,
            "euler",
            "simple",
            1024,
            1024,
            "circlestone-labs/Anima model card (30 to 50 steps, scale 4 to 5)",
        )
    },
    hyper_defaults={
        "denoiser": {"_class_name": "Anima"},
        "vae": vae_qwen.DEFAULTS,
        "text_encoder": qwen3_text.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    },
)
