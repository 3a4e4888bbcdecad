"""Wan 2.1 and 2.2 (text, image, VACE): the makers' names are canonical.

Norms two and three change places between the namings. Key correspondence:
huggingface/diffusers@58eb52c:src/diffusers/loaders/single_file_utils.py,
convert_wan_transformer_to_diffusers.
"""

from __future__ import annotations

from diffquant.convert.architectures import (
    t5_encoder,
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
    Layout,
    Sampling,
    Signature,
    Variant,
)
from diffquant.convert.architectures.links import Link, rename_table
from diffquant.convert.architectures.names import USUAL, channels_read, count, usual_heads, width
from diffquant.convert.architectures.recognised_vaes import WAN_22
from diffquant.convert.rules import Shapes

__all__ = ["WAN"]

_IMAGE = "condition_embedder.image_embedder."
_TOP = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    f"{_IMAGE}norm1": "img_emb.proj.0",
    f"{_IMAGE}ff.net.0.proj": "img_emb.proj.1",
    f"{_IMAGE}ff.net.2": "img_emb.proj.3",
    f"{_IMAGE}norm2": "img_emb.proj.4",
    f"{_IMAGE}pos_embed": "img_emb.emb_pos",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
}
_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_in": "before_proj",
    "proj_out": "after_proj",
    **{f"attn1.{a}": f"self_attn.{b}" for a, b in _ATTENTION.items()},
    **{f"attn2.{a}": f"cross_attn.{b}" for a, b in _ATTENTION.items()},
}


def _links(shapes: Shapes, layout: Layout) -> list[Link]:
    links = rename_table(_TOP)
    for stack in ("blocks", "vace_blocks"):
        for i in range(count(shapes, stack)):
            links += rename_table(_BLOCK, f"{stack}.{i}.", f"{stack}.{i}.")
    return links


def _facts(shapes: Shapes) -> Facts:
    hidden = width(shapes, "scale_shift_table", -1)
    patch = shapes.get("patch_embedding.weight", ())[-3:]
    made = width(shapes, "proj_out.weight", 0)
    volume = patch[0] * patch[1] * patch[2] if len(patch) == 3 else 0
    return {
        "in_channels": channels_read(shapes, "patch_embedding.weight", hidden),
        "out_channels": made // volume if made and volume else None,
        "patch_size": tuple(patch),
        "num_layers": count(shapes, "blocks"),
        USUAL: usual_heads(hidden, 128),
        "ffn_dim": width(shapes, "blocks.0.ffn.net.0.proj.weight", 0),
        "text_dim": width(shapes, "condition_embedder.text_embedder.linear_1.weight", 1),
        "freq_dim": width(shapes, "condition_embedder.time_embedder.linear_1.weight", 1),
        "image_dim": width(shapes, f"{_IMAGE}norm1.weight", 0),
        "vace_layers": count(shapes, "vace_blocks") or None,
        "_width": hidden,
        "_image": f"{_IMAGE}norm1.weight" in shapes,
        "_frames": f"{_IMAGE}pos_embed" in shapes,
        "_vace": "vace_patch_embedding.weight" in shapes,
    }


_CG = "city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:329-425"
_AUTO = "city96/ComfyUI-GGUF@4dfc025:tools/lcpp.patch (branch auto_convert)"
_SIBLINGS = (
    "; the two halves of Wan 2.2 A14B (high and low noise) and Wan 2.1 have the same names and "
    "shapes and cannot be told apart"
)

WAN = Architecture(
    slug="wan",
    title="Wan",
    components=(
        Component(
            name="denoiser",
            kind="wan",
            folder="transformer",
            prefixes=PREFIXES,
            signatures={
                "canonical": Signature(
                    (
                        "patch_embedding.weight",
                        "text_embedding.0.weight",
                        "time_embedding.0.weight",
                        "time_projection.1.weight",
                        "blocks.0.self_attn.q.weight",
                        "blocks.0.cross_attn.norm_k.weight",
                        "blocks.0.modulation",
                        "head.modulation",
                        "head.head.weight",
                    )
                ),
                "diffusers": Signature(
                    (
                        "patch_embedding.weight",
                        "condition_embedder.time_embedder.linear_1.weight",
                        "condition_embedder.time_proj.weight",
                        "condition_embedder.text_embedder.linear_1.weight",
                        "blocks.0.attn1.to_q.weight",
                        "blocks.0.attn2.norm_k.weight",
                        "blocks.0.scale_shift_table",
                        "scale_shift_table",
                        "proj_out.weight",
                    )
                ),
            },
            links=_links,
            facts=_facts,
        ),
        vae_qwen.component(("vae.", "first_stage_model.")),
        WAN_22.component(("vae.", "first_stage_model.")),
        t5_encoder.component(
            ("text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl."),
            folder="text_encoder",
        ),
    ),
    variants=(
        Variant("animate", {}, "a face adapter: Animate", starts="face_adapter."),
        Variant("s2v", {}, "an encoder of sound: S2V", starts="casual_audio_encoder."),
        Variant("camera", {}, "a control adapter: Fun Camera", starts="control_adapter."),
        Variant(
            "anyflow",
            {},
            "an embedder of the length of a step: AnyFlow",
            starts="condition_embedder.delta_embedder.",
        ),
        Variant("vace_14b", {"_vace": True, "_width": 5120}, "VACE blocks, 5120 wide: VACE 14B"),
        Variant("vace_1.3b", {"_vace": True, "_width": 1536}, "VACE blocks, 1536 wide: VACE 1.3B"),
        Variant(
            "ti2v_5b",
            {"_width": 3072},
            "3072 wide, 48 latent channels: Wan 2.2 TI2V 5B; its VAE is not Wan 2.1's",
        ),
        Variant(
            "flf2v_14b",
            {"_width": 5120, "in_channels": 36, "_frames": True},
            "36 input channels, positions of two images: first and last frame to video, 14B",
        ),
        Variant(
            "i2v_14b",
            {"_width": 5120, "in_channels": 36, "_image": True},
            "36 input channels and image features, 5120 wide: Wan 2.1 image to video or "
            "inpainting, 14B",
        ),
        Variant(
            "i2v_a14b",
            {"_width": 5120, "in_channels": 36},
            "36 input channels and no image features, 5120 wide: Wan 2.2 A14B image to video or "
            "inpainting; its two halves (high and low noise) cannot be told apart",
        ),
        Variant(
            "i2v_1.3b",
            {"_width": 1536, "in_channels": 36},
            "36 input channels, 1536 wide: image to video or inpainting, 1.3B",
        ),
        Variant(
            "t2v_a14b",
            {"_width": 5120, "in_channels": 16},
            "5120 wide, transformer_2 beside it: Wan 2.2 A14B, this one for high noise",
            starts="transformer_2/",
        ),
        Variant("t2v_14b", {"_width": 5120, "in_channels": 16}, "5120 wide: 14B" + _SIBLINGS),
        Variant("t2v_1.3b", {"_width": 1536, "in_channels": 16}, "1536 wide: 1.3B"),
        Variant("", {}, "an unlisted member of the family"),
    ),
    keep=(
        Keep(r"^(vace_)?patch_embedding\.", "video input", _CG),
        Keep(r"^text_embedding\.", "text input", _CG),
        Keep(r"^time_embedding\.", "timestep embedding", _CG),
        Keep(r"^time_projection\.", "modulation of every block", _CG),
        Keep(r"^img_emb\.emb_pos$", "table of positions", _CG, table=True),
        Keep(r"^img_emb\.", "image features", _CG),
        Keep(r"(^|\.)modulation$", "modulation table", _CG, table=True),
        Keep(r"^head\.", "output layer", _CG),
        Keep(
            r"^(cond_encoder|frame_packer|audio_injector|casual_audio_encoder|trainable_cond_mask)",
            "inputs of sound and motion (S2V)",
            _AUTO,
        ),
    ),
    families=(
        Family("v", r"\.(self|cross)_attn\.v\.weight$"),
        Family("ffn_down", r"\.ffn\.2\.weight$"),
    ),
    gguf_architecture="wan",
    gguf_prefix="",
    latent=Latent(16, 8, None, patch=2, space="wan21"),
    variant_spaces={"ti2v_5b": "wan22"},
    sampling={
        "": Sampling(50, 5.0, None, "unipc", "simple", 832, 480, "WanPipeline, diffusers 0.42.1")
    },
    hyper_defaults={
        # huggingface/diffusers@58eb52c:src/diffusers/models/transformers/transformer_wan.py
        "denoiser": {
            "_class_name": "WanTransformer3DModel",
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "rope_max_seq_len": 1024,
        },
        "vae": {**vae_qwen.DEFAULTS, "_class_name": "AutoencoderKLWan"},
        "text_encoder": {
            **t5_encoder.DEFAULTS,
            "architectures": ("UMT5EncoderModel",),
            "model_type": "umt5",
        },
        "scheduler": {
            "_class_name": "UniPCMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "num_train_timesteps": 1000,
            "flow_shift": 3.0,
        },
    },
    variant_defaults={
        **{
            name: {"denoiser": {"_class_name": "WanVACETransformer3DModel"}}
            for name in ("vace_14b", "vace_1.3b")
        },
        # Wan 2.1's means do not fit 48 channels.
        "ti2v_5b": {"vae": {"latents_mean": None, "latents_std": None}},
    },
)
