"""Hunyuan: Video (and Image 2.1, Video 1.5, built alike) and the older DiT.

The makers' names are canonical. Key correspondence of Video:
huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_hunyuan_video_transformer_to_diffusers. Image 2.1, Video 1.5 and DiT are recognised in both
namings, but not rewritten: no converter states the correspondence.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    clip_text,
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
from diffquant.convert.architectures.names import channels_read, count, width
from diffquant.convert.architectures.recognised_vaes import HUNYUAN as HUNYUAN_VAE
from diffquant.convert.architectures.recognised_vaes import HUNYUAN_15
from diffquant.convert.rules import Shapes

__all__ = ["HUNYUAN"]

_TEXT = "context_embedder."
_TOP = {
    "x_embedder": "img_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    f"{_TEXT}proj_in": "txt_in.input_embedder",
    f"{_TEXT}time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    f"{_TEXT}time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    f"{_TEXT}time_text_embed.text_embedder": "txt_in.c_embedder",
    "proj_out": "final_layer.linear",
}
_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.to_out.0": "self_attn_proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm_out.linear": "adaLN_modulation.1",
}
_DOUBLE = {
    "norm1.linear": "img_mod.linear",
    "norm1_context.linear": "txt_mod.linear",
    "attn.norm_q": "img_attn_q_norm",
    "attn.norm_k": "img_attn_k_norm",
    "attn.to_out.0": "img_attn_proj",
    "attn.norm_added_q": "txt_attn_q_norm",
    "attn.norm_added_k": "txt_attn_k_norm",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp.fc1",
    "ff.net.2": "img_mlp.fc2",
    "ff_context.net.0.proj": "txt_mlp.fc1",
    "ff_context.net.2": "txt_mlp.fc2",
}
_SINGLE = {
    "norm.linear": "modulation.linear",
    "attn.norm_q": "q_norm",
    "attn.norm_k": "k_norm",
    "proj_out": "linear2",
}
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    canonical = layout == "canonical"
    links = rename_table(_TOP)
    links.append(Link(("norm_out.linear",), "final_layer.adaLN_modulation.1", "swap"))
    inner = "txt_in.individual_token_refiner.blocks"
    outer = f"{_TEXT}token_refiner.refiner_blocks"
    for i in range(count(shapes, inner if canonical else outer)):
        ours, theirs = f"{inner}.{i}.", f"{outer}.{i}."
        links += rename_table(_REFINER, theirs, ours)
        links.append(Link(tuple(theirs + one for one in _QKV), f"{ours}self_attn_qkv", "fuse"))
    for i in range(count(shapes, "double_blocks" if canonical else "transformer_blocks")):
        ours, theirs = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        links += rename_table(_DOUBLE, theirs, ours)
        links.append(Link(tuple(theirs + one for one in _QKV), f"{ours}img_attn_qkv", "fuse"))
        links.append(Link(tuple(theirs + one for one in _ADDED), f"{ours}txt_attn_qkv", "fuse"))
    for i in range(count(shapes, "single_blocks" if canonical else "single_transformer_blocks")):
        ours, theirs = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        links += rename_table(_SINGLE, theirs, ours)
        members = tuple(theirs + one for one in (*_QKV, "proj_mlp"))
        rows = _linear1_rows(shapes, ours) if canonical else ()
        links.append(Link(members, f"{ours}linear1", "fuse", rows))
    return links


def _linear1_rows(shapes: Shapes, block: str) -> tuple[int, ...]:
    """Rows of q, k, v and the MLP: attention is as wide as the stream that linear1 reads."""
    total, hidden = shapes.get(f"{block}linear1.weight", (0, 0))
    return (hidden, hidden, hidden, total - 3 * hidden)


def _facts(shapes: Shapes) -> Facts:
    hidden = width(shapes, "proj_out.weight", 1)
    head_dim = width(shapes, "transformer_blocks.0.attn.norm_q.weight", 0)
    return {
        "in_channels": channels_read(shapes, "x_embedder.proj.weight", hidden),
        "num_layers": count(shapes, "transformer_blocks"),
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "num_refiner_layers": count(shapes, f"{_TEXT}token_refiner.refiner_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim if hidden and head_dim else None,
        "text_embed_dim": width(shapes, f"{_TEXT}proj_in.weight", 1),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "_kind": "video",
    }


def _later_facts(shapes: Shapes) -> Facts:
    """Image 2.1 and Video 1.5, in either naming."""
    vision = ("vision_in.proj.0.weight", "image_embedder.linear_1.weight")
    return {
        "in_channels": width(shapes, "img_in.proj.weight", 1)
        or width(shapes, "x_embedder.proj.weight", 1),
        "num_layers": count(shapes, "double_blocks") or count(shapes, "transformer_blocks"),
        "_kind": "video_1.5" if any(one in shapes for one in vision) else "image",
    }


def _dit_facts(shapes: Shapes) -> Facts:
    """HunyuanDiT, in either naming."""
    extra = width(shapes, "extra_embedder.0.weight", 1)
    theirs = width(shapes, "time_extra_emb.extra_embedder.linear_1.weight", 1)
    return {
        "num_layers": count(shapes, "blocks"),
        "hidden_size": width(shapes, "x_embedder.proj.weight", 0)
        or width(shapes, "pos_embed.proj.weight", 0),
        "_extra": extra or theirs,
        "_kind": "dit",
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"
_DIT = "huggingface/diffusers@58eb52c:src/diffusers/models/transformers/hunyuan_transformer_2d.py"
_BLOCKS = (
    "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "img_in.proj.weight",
    "double_blocks.0.img_attn_qkv.weight",
    "final_layer.linear.weight",
)
_THEIRS = (
    "x_embedder.proj.weight",
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
    "proj_out.weight",
)

HUNYUAN = Architecture(
    slug="hunyuan",
    title="Hunyuan",
    components=(
        Component(
            name="denoiser",
            kind="hunyuan_video",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        *_BLOCKS,
                        "time_in.mlp.0.weight",
                        "vector_in.in_layer.weight",
                        "single_blocks.0.linear1.weight",
                    )
                ),
                "diffusers": Signature(
                    (
                        *_THEIRS,
                        "time_text_embed.timestep_embedder.linear_1.weight",
                        "time_text_embed.text_embedder.linear_1.weight",
                        "single_transformer_blocks.0.proj_mlp.weight",
                    )
                ),
            },
            links=_links,
            facts=_facts,
        ),
        Component(
            name="denoiser",
            kind="hunyuan_later",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature((*_BLOCKS, "time_in.mlp.0.weight"), ("vector_in.",)),
                "diffusers": Signature(
                    _THEIRS, ("time_text_embed.", "clean_x_embedder.", "image_projection.")
                ),
            },
            links=None,
            facts=_later_facts,
        ),
        Component(
            name="denoiser",
            kind="hunyuan_dit",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    ("mlp_t5.0.weight", "x_embedder.proj.weight", "extra_embedder.0.weight"),
                    ("controlnet.",),
                ),
                "diffusers": Signature(
                    (
                        "text_embedding_padding",
                        "text_embedder.linear_1.weight",
                        "pos_embed.proj.weight",
                        "time_extra_emb.pooler.positional_embedding",
                        "time_extra_emb.extra_embedder.linear_1.weight",
                        "blocks.0.attn1.to_q.weight",
                        "blocks.0.attn2.norm_q.weight",
                        "norm_out.linear.weight",
                    ),
                    ("controlnet_",),
                ),
            },
            links=None,
            facts=_dit_facts,
        ),
        HUNYUAN_VAE.component(("vae.", "first_stage_model.")),
        HUNYUAN_15.component(("vae.", "first_stage_model.")),
        clip_text.component(
            ("text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
            name="text_encoder_2",
            folder="text_encoder_2",
        ),
    ),
    variants=(
        Variant(
            "dit_v1.1",
            {"_kind": "dit", "_extra": 3968},
            "embedders of size and style: HunyuanDiT v1.0 or v1.1",
        ),
        Variant("dit", {"_kind": "dit"}, "T5 beside a Bert encoder: HunyuanDiT v1.2"),
        Variant("video_1.5", {"_kind": "video_1.5"}, "image features: HunyuanVideo 1.5"),
        Variant("image", {"_kind": "image"}, "no pooled text: HunyuanImage 2.1"),
        Variant(
            "video_i2v",
            {"_kind": "video", "in_channels": 33},
            "33 input channels: HunyuanVideo image to video",
        ),
        Variant(
            "video_skyreels",
            {"_kind": "video", "in_channels": 32},
            "32 input channels: SkyReels image to video",
        ),
        Variant(
            "framepack",
            {"_kind": "video"},
            "an embedder of clean latents: FramePack",
            starts="clean_x_embedder.",
        ),
        Variant("video", {"_kind": "video"}, "refiner of text tokens, pooled text: HunyuanVideo"),
        Variant("", {}, "an unlisted member of the family"),
    ),
    keep=(
        Keep(r"^(img_in|x_embedder)\.", "input, and detection reads its width", _CG),
        Keep(r"^(txt_in|context_embedder)\.", "text input", _CG),
        Keep(r"^(time_in|time_text_embed|time_embed)\.", "timestep embedding", _CG),
        Keep(r"^vector_in\.", "pooled text embedding", _CG),
        Keep(r"^guidance_in\.", "guidance embedding", _CG),
        Keep(r"^final_layer\.", "output layer", _CG),
        Keep(
            r"^(cond_type_embedding|cond_type_embed)\.",
            "table of condition types (Video 1.5)",
            "city96/ComfyUI-GGUF@795e451, pull request 364",
            table=True,
        ),
        Keep(r"^(vision_in|image_embedder|byt5_in|context_embedder_2)\.", "further inputs", _CG),
        Keep(r"^(norm_out|proj_out)\.", "output modulation and layer", _CG),
        Keep(r"(^|\.)(text_embedding_padding|positional_embedding)$", "table", _DIT, table=True),
        Keep(r"^(t_embedder|extra_embedder|mlp_t5|pooler|text_embedder)\.", "inputs (DiT)", _DIT),
        Keep(r"style_embedder\.weight$", "table of styles (DiT)", _DIT, table=True),
        Keep(r"^time_extra_emb\.", "timestep and size (DiT)", _DIT),
        Keep(r"^pos_embed\.", "image input (DiT)", _DIT),
    ),
    families=(Family("qkv", r"^(double_)?blocks\.\d+\..*(attn_qkv|\.Wqkv)\.weight$"),),
    gguf_architecture="hyvid",
    gguf_prefix="",
    gguf_names={"dit": "hydit", "dit_v1.1": "hydit"},
    latent=Latent(16, 8, 0.476986, patch=2, space="hunyuan_video"),
    variant_spaces={
        "dit": "",  # not stated here
        "dit_v1.1": "",
        "image": "hunyuan_image",
        "video_1.5": "hunyuan_video_1.5",
    },
    sampling={
        "": Sampling(
            50, 1.0, 6.0, "euler", "simple", 1280, 720, "HunyuanVideoPipeline, diffusers 0.42.1"
        ),
        "dit": Sampling(
            50, 5.0, None, "ddpm", "normal", 1024, 1024, "HunyuanDiTPipeline, diffusers 0.42.1"
        ),
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:
        # src/diffusers/models/transformers/transformer_hunyuan_video.py
        "denoiser": {
            "_class_name": "HunyuanVideoTransformer3DModel",
            "patch_size": 2,
            "patch_size_t": 1,
            "rope_theta": 256.0,
            "rope_axes_dim": (16, 56, 56),
        },
        "vae": {"_class_name": "AutoencoderKLHunyuanVideo", "scaling_factor": 0.476986},
        "text_encoder_2": clip_text.CLIP_L_DEFAULTS,
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 7.0,
        },
    },
    variant_defaults={
        "dit": {"denoiser": {"_class_name": "HunyuanDiT2DModel"}},
        "dit_v1.1": {"denoiser": {"_class_name": "HunyuanDiT2DModel"}},
        "image": {"denoiser": {"_class_name": "HunyuanImageTransformer2DModel"}},
        "video_1.5": {
            "denoiser": {"_class_name": "HunyuanVideo15Transformer3DModel"},
            "vae": {"_class_name": "AutoencoderKLHunyuanVideo15", "scaling_factor": 1.03682},
        },
    },
)
