"""Krea 2: the makers' names are canonical; Diffusers' names are read.

The two cannot be rewritten into each other yet: the makers store a block's six modulation vectors
as one long one, which no rule here views as a matrix (huggingface/diffusers@58eb52c:
src/diffusers/loaders/single_file_utils.py, convert_krea2_transformer_checkpoint_to_diffusers).
"""

from __future__ import annotations

from diffquant.convert.architectures import (
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

__all__ = ["KREA2"]


def _facts(shapes: Shapes) -> Facts:
    """Sizes from either naming."""
    return {
        "in_channels": width(shapes, "first.weight", 1) or width(shapes, "img_in.weight", 1),
        "num_layers": count(shapes, "blocks") or count(shapes, "transformer_blocks"),
        "hidden_size": width(shapes, "first.weight", 0) or width(shapes, "img_in.weight", 0),
    }


_CTQ = "silveroxides/convert_to_quant@ee83a4d:convert_to_quant/constants.py, --krea2"

KREA2 = Architecture(
    slug="krea2",
    title="Krea 2",
    components=(
        Component(
            name="denoiser",
            kind="krea2",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "first.weight",
                        "tmlp.0.weight",
                        "tproj.1.weight",
                        "txtfusion.projector.weight",
                        "txtmlp.1.weight",
                        "blocks.0.attn.wq.weight",
                        "blocks.0.mod.lin",
                        "last.linear.weight",
                    )
                ),
                "diffusers": Signature(
                    (
                        "img_in.weight",
                        "time_embed.linear_1.weight",
                        "time_mod_proj.weight",
                        "text_fusion.projector.weight",
                        "txt_in.linear_1.weight",
                        "transformer_blocks.0.attn.to_gate.weight",
                        "transformer_blocks.0.scale_shift_table",
                        "final_layer.linear.weight",
                    )
                ),
            },
            links=None,
            facts=_facts,
        ),
        vae_qwen.component(("vae.", "first_stage_model.")),
    ),
    variants=(
        Variant(
            "",
            {},
            "fused layers of a text encoder; Turbo and base have the same names and shapes and "
            "cannot be told apart",
        ),
    ),
    keep=(
        Keep(r"^(first|img_in)\.", "image input, and detection reads its width", _CTQ),
        Keep(r"^(tmlp|tproj|time_embed|time_mod_proj)\.", "timestep and modulation", _CTQ),
        Keep(r"^(txtfusion|text_fusion)\.", "fusion of the text encoder's layers", _CTQ),
        Keep(r"^(txtmlp|txt_in)\.", "text input", _CTQ),
        Keep(r"(\.mod\.lin|modulation\.lin|scale_shift_table)$", "modulation", _CTQ, table=True),
        Keep(r"^(last|final_layer)\.", "output layer", _CTQ),
    ),
    families=(
        Family("v", r"^(transformer_)?blocks\.\d+\.attn\.(wv|to_v)\.weight$"),
        Family("ffn_down", r"^(transformer_)?blocks\.\d+\.(mlp|ff)\.down\.weight$"),
    ),
    gguf_architecture="krea2",
    gguf_prefix="",
    gguf_note="of the loaders of GGUF files, calcuis/gguf alone knows general.architecture krea2",
    latent=Latent(16, 8, None, patch=2, space="wan21"),
    sampling={
        "": Sampling(
            28, 4.5, None, "euler", "simple", 1024, 1024, "Krea2Pipeline, diffusers 0.42.1"
        )
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_krea2.py
        "denoiser": {"_class_name": "Krea2Transformer2DModel"},
        "vae": vae_qwen.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": True,
        },
    },
)
