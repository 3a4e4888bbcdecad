"""Encoders of text and images that are recognised and never rewritten.

Names: the classes of huggingface/transformers of these model types, in version 5's naming
(`model.language_model.`), version 4's (`language_model.model.`) and that of the language model
alone (`model.`), which ComfyUI's files have (Comfy-Org/ComfyUI@35ead00:comfy/sd.py,
detect_te_model; comfy/clip_vision.py, load_clipvision_from_sd).
"""

from __future__ import annotations

from collections.abc import Mapping

from diffquant.convert.architectures.base import Layout, Variant
from diffquant.convert.architectures.recognised import Known

__all__ = ["KNOWN_ENCODERS"]

_BASES: Mapping[Layout, str] = {
    "canonical": "model.",
    "diffusers": "model.language_model.",
    "alternate": "language_model.model.",
}
_LLAMA = (
    "embed_tokens.weight",
    "layers.0.self_attn.q_proj.weight",
    "layers.0.mlp.gate_proj.weight",
    "layers.0.post_attention_layernorm.weight",
    "norm.weight",
)
_SIZES = {
    "vocab_size": (
        *((f"{base}embed_tokens.weight", 0) for base in _BASES.values()),
        ("token_embd.weight", 0),
    ),
    "hidden_size": (
        *((f"{base}embed_tokens.weight", 1) for base in _BASES.values()),
        ("token_embd.weight", 1),
    ),
}
_COUNTS = {"num_hidden_layers": (*(f"{base}layers" for base in _BASES.values()), "blk")}
# Vocabularies of Llama 3 and 3.1, and of LLaVA's, which has some tokens more.
_LLAMA_3 = (128256, 128320)
# Beginnings of keys of models that have an encoder of images and are something else.
_OTHERS = (
    "language_model.",
    "qformer.",
    "aligner.",
    "decoder.",
    "class_head.",
    "box_head.",
    "mit.",
    "gated_cross_attn_layers.",
)
_GLM = ("encoder.layers.0.self_attention.query_key_value.weight", "encoder.final_layernorm.weight")


def _named(*keys: str) -> dict[Layout, tuple[str, ...]]:
    return {layout: tuple(base + key for key in keys) for layout, base in _BASES.items()}


def _vision(model: str, *keys: str) -> tuple[str, ...]:
    body = ("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight")
    return tuple(f"{model}{key}" for key in (*body, "post_layernorm.weight", *keys))


KNOWN_ENCODERS: tuple[Known, ...] = (
    Known(
        "llava_llama3_text",
        "LLaVA of Llama 3",
        {
            "diffusers": (
                *(f"model.language_model.{key}" for key in _LLAMA),
                "model.multi_modal_projector.linear_1.weight",
            ),
            "alternate": (
                *(f"language_model.model.{key}" for key in _LLAMA),
                "multi_modal_projector.linear_1.weight",
            ),
        },
        sizes=_SIZES,
        counts=_COUNTS,
        where={"vocab_size": _LLAMA_3},
        members=(Variant("8b", {"hidden_size": 4096}, "4096 wide: 8B, which HunyuanVideo reads"),),
        name="text_encoder",
    ),
    Known(
        "llama3_text",
        "Llama 3",
        {
            **_named(*_LLAMA),
            "gguf": (
                "token_embd.weight",
                "blk.0.attn_q.weight",
                "blk.0.ffn_gate.weight",
                "output_norm.weight",
            ),
        },
        ("model.layers.0.self_attn.q_norm.", "blk.0.attn_q_norm.", "blk.0.attn_q.bias"),
        sizes=_SIZES,
        counts=_COUNTS,
        where={"vocab_size": _LLAMA_3},
        members=(
            Variant(
                "8b",
                {"hidden_size": 4096, "vocab_size": 128256},
                "4096 wide: 8B; 3 and 3.1, which HiDream-I1 reads, cannot be told apart",
            ),
            Variant(
                "8b_llava",
                {"hidden_size": 4096},
                "4096 wide, 128320 tokens: 8B, the text half of HunyuanVideo's LLaVA",
            ),
            Variant("1b", {"hidden_size": 2048}, "2048 wide: 1B"),
            Variant("3b", {"hidden_size": 3072}, "3072 wide: 3B"),
        ),
        name="text_encoder",
    ),
    Known(
        "gemma3_text",
        "Gemma 3",
        {
            **_named(
                *_LLAMA,
                "layers.0.self_attn.q_norm.weight",
                "layers.0.pre_feedforward_layernorm.weight",
                "layers.0.post_feedforward_layernorm.weight",
            ),
            "gguf": (
                "token_embd.weight",
                "blk.0.attn_q_norm.weight",
                "blk.0.post_ffw_norm.weight",
                "output_norm.weight",
            ),
        },
        sizes=_SIZES,
        counts=_COUNTS,
        members=(
            Variant("1b", {"hidden_size": 1152}, "1152 wide: 1B"),
            Variant("4b", {"hidden_size": 2560}, "2560 wide: 4B"),
            Variant("12b", {"hidden_size": 3840}, "3840 wide: 12B, which LTX-2 reads"),
            Variant("27b", {"hidden_size": 5376}, "5376 wide: 27B"),
        ),
        name="text_encoder",
    ),
    Known(
        "qwen3_vl_text",
        "Qwen3-VL",
        {
            "canonical": (
                *(f"model.{key}" for key in _LLAMA),
                "model.layers.0.self_attn.q_norm.weight",
                "visual.deepstack_merger_list.0.norm.weight",
            ),
            "diffusers": (
                *(f"model.language_model.{key}" for key in _LLAMA),
                "model.language_model.layers.0.self_attn.q_norm.weight",
                "model.visual.deepstack_merger_list.0.norm.weight",
            ),
        },
        sizes=_SIZES,
        counts=_COUNTS,
        members=(
            Variant("2b", {"hidden_size": 2048}, "2048 wide: 2B"),
            Variant("4b", {"hidden_size": 2560}, "2560 wide: 4B"),
            Variant("8b", {"hidden_size": 4096}, "4096 wide: 8B"),
            Variant("32b", {"hidden_size": 5120}, "5120 wide: 32B"),
        ),
        name="text_encoder",
    ),
    Known(
        "chatglm_text",
        "ChatGLM3",
        {  # huggingface/diffusers@58eb52c:src/diffusers/pipelines/kolors/text_encoder.py
            "canonical": ("embedding.word_embeddings.weight", *_GLM),
            "alternate": (
                "transformer.embedding.word_embeddings.weight",
                *(f"transformer.{key}" for key in _GLM),
            ),
        },
        sizes={
            "hidden_size": (
                ("embedding.word_embeddings.weight", 1),
                ("transformer.embedding.word_embeddings.weight", 1),
            )
        },
        counts={"num_layers": ("encoder.layers", "transformer.encoder.layers")},
        members=(Variant("6b", {"hidden_size": 4096}, "4096 wide: 6B, which Kolors reads"),),
        name="text_encoder",
    ),
    Known(
        "bert_text",
        "Bert",
        {
            "canonical": (
                "embeddings.word_embeddings.weight",
                "encoder.layer.0.attention.self.query.weight",
            ),
            "alternate": (
                "bert.embeddings.word_embeddings.weight",
                "bert.encoder.layer.0.attention.self.query.weight",
            ),
        },
        sizes={
            "vocab_size": (
                ("embeddings.word_embeddings.weight", 0),
                ("bert.embeddings.word_embeddings.weight", 0),
            )
        },
        where={"vocab_size": (47020,)},
        members=(Variant("hunyuan_dit", {}, "47020 tokens: HunyuanDiT's"),),
        name="text_encoder",
    ),
    Known(
        "clip_towers",
        "CLIP, towers of text and of images together",
        {
            "canonical": (
                "text_model.embeddings.token_embedding.weight",
                *_vision("vision_model."),
                "text_projection.weight",
            )
        },
        _OTHERS,
        sizes={
            "hidden_size": (("text_model.embeddings.token_embedding.weight", 1),),
            "image_width": (("vision_model.embeddings.patch_embedding.weight", 0),),
        },
        where={"hidden_size": (768, 1024, 1280), "image_width": (1024, 1280, 1664)},
        members=(
            Variant("clip_l", {"hidden_size": 768, "image_width": 1024}, "768 wide text: CLIP-L"),
            Variant("openclip_h", {"hidden_size": 1024}, "1024 wide text: OpenCLIP-H"),
            Variant("openclip_g", {"hidden_size": 1280}, "1280 wide text: OpenCLIP-bigG"),
        ),
        name="text_encoder",
    ),
    Known(
        "clip_vision",
        "CLIP image encoder",
        {
            "canonical": _vision(
                "vision_model.", "pre_layrnorm.weight", "embeddings.class_embedding"
            ),
            "alternate": (
                "visual.conv1.weight",
                "visual.ln_post.weight",
                "visual.transformer.resblocks.0.attn.in_proj_weight",
            ),
        },
        ("text_model.", "token_embedding.", *_OTHERS),
        sizes={
            "hidden_size": (
                ("vision_model.embeddings.patch_embedding.weight", 0),
                ("visual.conv1.weight", 0),
            ),
            "positions": (
                ("vision_model.embeddings.position_embedding.weight", 0),
                ("visual.positional_embedding", 0),
            ),
        },
        counts={
            "num_hidden_layers": ("vision_model.encoder.layers", "visual.transformer.resblocks")
        },
        where={"hidden_size": (768, 1024, 1280, 1664)},
        members=(
            Variant(
                "clip_l_336",
                {"hidden_size": 1024, "positions": 577},
                "1024 wide, 336 pixels: CLIP-L/14",
            ),
            Variant("clip_l", {"hidden_size": 1024}, "1024 wide: CLIP-L/14"),
            Variant("openclip_h", {"hidden_size": 1280}, "1280 wide: OpenCLIP-H/14"),
            Variant("openclip_g", {"hidden_size": 1664}, "1664 wide: OpenCLIP-bigG/14"),
        ),
        name="image_encoder",
    ),
    Known(
        "siglip_vision",
        "SigLIP image encoder",
        {
            "canonical": _vision("vision_model.", "embeddings.patch_embedding.bias"),
            "alternate": _vision("", "embeddings.patch_embedding.bias"),
        },
        (
            "text_model.",
            "vision_model.embeddings.class_embedding",
            "vision_model.pre_layrnorm.",
            "embeddings.class_embedding",
            "pre_layrnorm.",
            *_OTHERS,
        ),
        sizes={
            "hidden_size": (
                ("vision_model.embeddings.patch_embedding.weight", 0),
                ("embeddings.patch_embedding.weight", 0),
            ),
            "positions": (
                ("vision_model.embeddings.position_embedding.weight", 0),
                ("embeddings.position_embedding.weight", 0),
            ),
        },
        counts={"num_hidden_layers": ("vision_model.encoder.layers", "encoder.layers")},
        where={"hidden_size": (768, 1024, 1152)},
        members=(
            Variant("so400m_384", {"hidden_size": 1152, "positions": 729}, "1152 wide, 384 pixels"),
            Variant(
                "so400m_512", {"hidden_size": 1152, "positions": 1024}, "1152 wide, 512 pixels"
            ),
            Variant("so400m", {"hidden_size": 1152}, "1152 wide: So400m"),
            Variant("base", {"hidden_size": 768}, "768 wide: base"),
        ),
        name="image_encoder",
    ),
)
