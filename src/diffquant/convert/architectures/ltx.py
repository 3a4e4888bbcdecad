"""LTX-Video and LTX-2 (with sound): the makers' names are canonical.

Names differ by single words, so links are made key by key. Key correspondence:
huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_ltx_transformer_checkpoint_to_diffusers, convert_ltx2_transformer_to_diffusers.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    t5_encoder,
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
from diffquant.convert.architectures.links import Link
from diffquant.convert.architectures.names import count, width
from diffquant.convert.architectures.recognised_vaes import LTX as LTX_VAE
from diffquant.convert.rules import Shapes

__all__ = ["LTX"]

# (Diffusers, canonical); the first that fits a beginning, and every one that fits a segment.
_BEGINS = (
    ("proj_in.", "patchify_proj."),
    ("audio_proj_in.", "audio_patchify_proj."),
    ("time_embed.", "adaln_single."),
    ("audio_time_embed.", "audio_adaln_single."),
    ("av_cross_attn_video_scale_shift.", "av_ca_video_scale_shift_adaln_single."),
    ("av_cross_attn_video_a2v_gate.", "av_ca_a2v_gate_adaln_single."),
    ("av_cross_attn_audio_scale_shift.", "av_ca_audio_scale_shift_adaln_single."),
    ("av_cross_attn_audio_v2a_gate.", "av_ca_v2a_gate_adaln_single."),
)
_SEGMENTS = (
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
    ("video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video"),
    ("audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio"),
)
_CONNECTORS = ("video_embeddings_connector", "audio_embeddings_connector")


def _renamed(key: str, *, canonical: bool) -> str:
    """A key of one naming in the other."""
    ours = 1 if canonical else 0
    for row in _BEGINS:
        if key.startswith(row[ours]):
            key = row[1 - ours] + key[len(row[ours]) :]
            break
    words = {row[ours]: row[1 - ours] for row in _SEGMENTS}
    return ".".join(words.get(one, one) for one in key.split("."))


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    canonical = layout == "canonical"
    reason = "a module of its own in Diffusers"
    links = [Link((), one, "drop", reason=reason) for one in _CONNECTORS]
    for key in shapes:
        if key.startswith(_CONNECTORS):
            continue
        other = _renamed(key, canonical=canonical)
        links.append(Link((other,), key) if canonical else Link((key,), other))
    return links


def _facts(shapes: Shapes) -> Facts:
    hidden = width(shapes, "proj_in.weight", 0)
    return {
        "in_channels": width(shapes, "proj_in.weight", 1),
        "out_channels": width(shapes, "proj_out.weight", 0),
        "num_layers": count(shapes, "transformer_blocks"),
        "cross_attention_dim": width(shapes, "transformer_blocks.0.attn2.to_k.weight", 1),
        "caption_channels": width(shapes, "caption_projection.linear_1.weight", 1),
        "_width": hidden,
        "_sound": "audio_proj_in.weight" in shapes,
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"
_CQ = "Comfy-Org/comfy-quants@5d8eaae:src/comfy_quants/model_adapters/ltxv.py"

LTX = Architecture(
    slug="ltx",
    title="LTX-Video",
    components=(
        Component(
            name="denoiser",
            kind="ltx",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "patchify_proj.weight",
                        "adaln_single.emb.timestep_embedder.linear_1.weight",
                        "adaln_single.linear.weight",
                        "scale_shift_table",
                        "transformer_blocks.0.attn1.q_norm.weight",
                        "transformer_blocks.0.attn2.to_q.weight",
                        "transformer_blocks.0.scale_shift_table",
                        "proj_out.weight",
                    )
                ),
                "diffusers": Signature(
                    (
                        "proj_in.weight",
                        "time_embed.emb.timestep_embedder.linear_1.weight",
                        "time_embed.linear.weight",
                        "scale_shift_table",
                        "transformer_blocks.0.attn1.norm_q.weight",
                        "transformer_blocks.0.attn2.to_q.weight",
                        "transformer_blocks.0.scale_shift_table",
                        "proj_out.weight",
                    )
                ),
            },
            links=_links,
            facts=_facts,
        ),
        LTX_VAE.component(("vae.", "first_stage_model.")),
        t5_encoder.component(
            ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."), folder="text_encoder"
        ),
    ),
    variants=(
        Variant("2", {"_sound": True}, "a second stream for sound: LTX-2"),
        Variant("13b", {"_width": 4096, "_sound": False}, "4096 wide: LTX-Video 13B"),
        Variant("2b", {"_width": 2048, "_sound": False}, "2048 wide: LTX-Video 2B"),
        Variant("", {}, "an unlisted member of the family"),
    ),
    keep=(
        Keep(r"^(audio_)?patchify_proj\.", "input", _CG),
        Keep(r"^(audio_)?adaln_single\.", "timestep embedding and modulation", _CG),
        Keep(r"^av_ca_\w+_adaln_single\.", "modulation between picture and sound", _CQ),
        Keep(r"^(audio_)?caption_projection\.", "text input", _CG),
        Keep(r"scale_shift_table", "modulation table", _CG, table=True),
        Keep(r"^(audio_)?proj_out\.", "output layer", _CG),
        Keep(r"^(video|audio)_embeddings_connector\.", "text input (LTX-2)", _CQ),
    ),
    families=(
        Family("v", r"\.to_v\.weight$"),
        Family("ffn_down", r"\.(audio_)?ff\.net\.2\.weight$"),
    ),
    gguf_architecture="ltxv",
    gguf_prefix="",
    latent=Latent(128, 32, None, space="ltx"),
    variant_spaces={"2": "ltx2"},
    sampling={
        "": Sampling(50, 3.0, None, "euler", "simple", 704, 480, "LTXPipeline, diffusers 0.42.1")
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_ltx.py
        "denoiser": {
            "_class_name": "LTXVideoTransformer3DModel",
            "patch_size": 1,
            "patch_size_t": 1,
            "num_attention_heads": 32,
            "qk_norm": "rms_norm_across_heads",
            "norm_eps": 1e-6,
        },
        "vae": {"_class_name": "AutoencoderKLLTXVideo"},
        "text_encoder": t5_encoder.DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "use_dynamic_shifting": True,
        },
    },
    variant_defaults={"2": {"denoiser": {"_class_name": "LTX2VideoTransformer3DModel"}}},
)
