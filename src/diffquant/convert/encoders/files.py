"""ENCODER_FILES: how each kind of text encoder is written as a GGUF file, as data.

Language models follow llama.cpp (gguf-py 0.19.0 gguf/constants.py `Keys`, gguf/tensor_mapping.py;
ggml-org/llama.cpp convert_hf_to_gguf.py, T5EncoderModel, Qwen2VLModel, Qwen2VLVisionModel,
Qwen3Model). CLIP's text encoder has no place there: tensors keep transformers' names, which
stable-diffusion.cpp expects of `--clip_l` and `--clip_g` (leejet/stable-diffusion.cpp:
src/stable-diffusion.cpp, src/name_conversion.cpp: a bare open_clip name would get a prefix that it
does not map), and the header follows clip.cpp (monatis/clip.cpp: clip.text.*).

What ComfyUI-GGUF takes: city96/ComfyUI-GGUF@795e451:loader.py:12-14 (architectures), 213-284 (the
image tower, found by file name), 377-406 (names; tables of 65536 rows or more become F16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffquant.convert.architectures import qwen2_vl_text, qwen3_text, t5_encoder
from diffquant.convert.architectures.base import Family, Keep, Layout
from diffquant.convert.architectures.clip_text import CLIP_L_DEFAULTS
from diffquant.convert.architectures.openclip_text import BIGG_DEFAULTS
from diffquant.convert.rules import Shapes

__all__ = ["ENCODER_FILES", "EncoderFile", "Field"]

Known = Callable[[str], Any]


@dataclass(frozen=True, slots=True)
class Field:
    """One key of the header.

    Attributes:
        key: its name; what begins with a dot gets the file's architecture before it.
        type: GGUF type, of the elements for an array.
        value: config.json field, or what computes it from a lookup of such fields.
        needed: whether a reader fails without it.
    """

    key: str
    type: str
    value: str | Callable[[Known], Any]
    needed: bool = True


@dataclass(frozen=True, slots=True)
class EncoderFile:
    """How one kind is written. Patterns speak transformers' names, whatever the source has.

    Attributes:
        architecture: `general.architecture`.
        layout: naming of the tensors.
        type: `general.type`.
        fields: the header, in order.
        defaults: config.json fields where the source has no config, named when used.
        implied: shapes -> further such fields, which differ between sizes of the model.
        tokenizer: "unigram", "bpe", "clip_bpe", or "" where the file needs none.
        tables: weights that are no linear layer's: F32.
        embedding: pattern of the token embedding and of the output layer, which llama-quantize
            keeps at Q6_K or better where they are one tensor (llama_tensor_get_type).
        families: as the mixes of types know them.
        targets: TARGETS that read the file; the first is the default.
        unread: target -> why it does not.
        notes: what a user should know.
    """

    architecture: str
    layout: Layout
    fields: tuple[Field, ...]
    defaults: Mapping[str, object]
    tokenizer: str
    tables: tuple[Keep, ...]
    embedding: str
    families: tuple[Family, ...]
    targets: tuple[str, ...]
    unread: Mapping[str, str]
    type: str = "model"
    notes: tuple[str, ...] = ()
    implied: Callable[[Shapes], Mapping[str, object]] = lambda shapes: {}


def _rows(shapes: Shapes, *endings: str) -> int | None:
    """Rows of the first matrix with such a name."""
    return next(
        (shape[0] for key, shape in shapes.items() if key.endswith(endings) and shape), None
    )


def _qwen_heads(shapes: Shapes) -> Mapping[str, object]:
    """Heads of 128, as in every published size of Qwen2.5-VL."""
    found = {
        "num_attention_heads": _rows(
            shapes, "layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"
        ),
        "num_key_value_heads": _rows(
            shapes, "layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight"
        ),
    }
    return {name: rows // 128 for name, rows in found.items() if rows and not rows % 128}


def _clip_sizes(shapes: Shapes) -> Mapping[str, object]:
    """Heads of 64 in CLIP-L, OpenCLIP-H and bigG; OpenAI's CLIP-L alone has the quick GELU."""
    width = _rows(shapes, "final_layer_norm.weight", "ln_final.weight")
    if not width:
        return {}
    return {
        "num_attention_heads": width // 64,
        "hidden_act": "quick_gelu" if width == 768 else "gelu",
    }


def _integers(value: object) -> list[int]:
    """A config's list of whole numbers; nothing where it is anything else."""
    found = list(value) if isinstance(value, list | tuple) else []
    return found if all(type(one) is int for one in found) else []


def _sections(known: Known) -> list[int] | None:
    """Rotary sections of time, height and width, filled up to four as llama.cpp has them."""
    scaling = known("rope_scaling")
    given = scaling.get("mrope_section") if isinstance(scaling, Mapping) else None
    numbers = _integers(given)
    return [*numbers, *[0] * (4 - len(numbers))] if 0 < len(numbers) <= 4 else None


def _head_length(known: Known) -> int | None:
    """Only where the config states it: else readers divide width by heads, as the model does."""
    given = known("head_dim")
    return given if isinstance(given, int) else None


def _context(known: Known) -> int:
    given = known("n_positions")
    return given if isinstance(given, int) else 512  # llama.cpp's own, T5 having no limit


def _is_gelu(known: Known) -> bool | None:
    given = known("hidden_act")
    return given == "gelu" if isinstance(given, str) else None


def _window(known: Known) -> int | None:
    """Every n-th block sees the whole picture: indexes n-1, 2n-1 ..., as llama.cpp checks."""
    given = _integers(known("fullatt_block_indexes"))
    if not given:
        return None
    first = given[0] + 1
    regular = all(one + 1 == first * (i + 1) for i, one in enumerate(given))
    return first if regular else None


def _without(defaults: Mapping[str, object], *names: str) -> dict[str, object]:
    return {name: value for name, value in defaults.items() if name not in names}


_SIZES = ("num_attention_heads", "hidden_act")
_T5_FIELDS = (
    Field(".context_length", "u32", _context),
    Field(".embedding_length", "u32", "d_model"),
    Field(".feed_forward_length", "u32", "d_ff"),
    Field(".block_count", "u32", "num_layers"),
    Field(".attention.head_count", "u32", "num_heads"),
    Field(".attention.key_length", "u32", "d_kv"),
    Field(".attention.value_length", "u32", "d_kv"),
    Field(".attention.layer_norm_epsilon", "f32", "layer_norm_epsilon"),
    Field(".attention.relative_buckets_count", "u32", "relative_attention_num_buckets"),
    Field(".attention.layer_norm_rms_epsilon", "f32", "layer_norm_epsilon"),
    Field(".vocab_size", "u32", "vocab_size"),
    Field(".decoder_start_token_id", "u32", "decoder_start_token_id", needed=False),
)
_QWEN_FIELDS = (
    Field(".context_length", "u32", "max_position_embeddings"),
    Field(".embedding_length", "u32", "hidden_size"),
    Field(".feed_forward_length", "u32", "intermediate_size"),
    Field(".block_count", "u32", "num_hidden_layers"),
    Field(".attention.head_count", "u32", "num_attention_heads"),
    Field(".attention.head_count_kv", "u32", "num_key_value_heads"),
    Field(".attention.layer_norm_rms_epsilon", "f32", "rms_norm_eps"),
    Field(".attention.key_length", "u32", _head_length, needed=False),
    Field(".attention.value_length", "u32", _head_length, needed=False),
    Field(".rope.freq_base", "f32", "rope_theta"),
    Field(".vocab_size", "u32", "vocab_size"),
)
_CLIP_FIELDS = (
    Field("clip.has_text_encoder", "bool", lambda known: True),
    Field("clip.has_vision_encoder", "bool", lambda known: False),
    Field("clip.use_gelu", "bool", _is_gelu, needed=False),
    Field("clip.text.context_length", "u32", "max_position_embeddings"),
    Field("clip.text.embedding_length", "u32", "hidden_size"),
    Field("clip.text.feed_forward_length", "u32", "intermediate_size"),
    Field("clip.text.projection_dim", "u32", "projection_dim", needed=False),
    Field("clip.text.block_count", "u32", "num_hidden_layers"),
    Field("clip.text.attention.head_count", "u32", "num_attention_heads"),
    Field("clip.text.attention.layer_norm_epsilon", "f32", "layer_norm_eps"),
)
_TOWER_FIELDS = (
    Field("clip.has_vision_encoder", "bool", lambda known: True),
    Field("clip.projector_type", "str", lambda known: "qwen2.5vl_merger"),
    Field("clip.use_silu", "bool", lambda known: True),
    Field("clip.vision.image_size", "u32", "image_size"),
    Field("clip.vision.patch_size", "u32", "patch_size"),
    Field("clip.vision.embedding_length", "u32", "hidden_size"),
    Field("clip.vision.feed_forward_length", "u32", "intermediate_size"),
    Field("clip.vision.projection_dim", "u32", "out_hidden_size"),
    Field("clip.vision.block_count", "u32", "depth"),
    Field("clip.vision.attention.head_count", "u32", "num_heads"),
    Field("clip.vision.attention.layer_norm_epsilon", "f32", "rms_norm_eps"),
    Field("clip.vision.image_mean", "f32", "image_mean"),
    Field("clip.vision.image_std", "f32", "image_std"),
    Field("clip.vision.spatial_merge_size", "u32", "spatial_merge_size"),
    Field("clip.vision.n_wa_pattern", "u32", _window),
)
# Qwen/Qwen2.5-VL-7B-Instruct config.json, vision_config, and preprocessor_config.json; picture
# size: llama.cpp's Qwen2VLVisionModel, since the tower takes any.
_TOWER_DEFAULTS: Mapping[str, object] = {
    "model_type": "qwen2_5_vl",
    "num_heads": 16,
    "spatial_merge_size": 2,
    "fullatt_block_indexes": (7, 15, 23, 31),
    "image_size": 560,
    "rms_norm_eps": 1e-6,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}

_CG = "city96/ComfyUI-GGUF@795e451:loader.py:12-14"
_NO_DIFFUSERS = {
    "diffusers": "diffusers reads GGUF denoisers alone; transformers' from_pretrained(gguf_file=) "
    "reads language models",
    "forge": "its readers of text encoders in GGUF were not checked",
    "universal": "no text encoder in GGUF is read by every program",
}
_POSITIONS = Keep(r"position_embedding\.", "table of positions: F32", "sd.cpp src/clip.hpp")
_LANGUAGE = ("comfyui-gguf", "sdcpp")
_CLIP = EncoderFile(
    architecture="clip",
    layout="diffusers",
    fields=_CLIP_FIELDS,
    defaults=_without(CLIP_L_DEFAULTS, *_SIZES, "projection_dim"),
    implied=_clip_sizes,
    tokenizer="clip_bpe",
    tables=(_POSITIONS,),
    embedding=r"token_embedding\.weight$",
    families=(Family("v", r"\.v_proj\.weight$"), Family("ffn_down", r"mlp\.fc2\.weight$")),
    targets=("sdcpp",),
    unread={
        **_NO_DIFFUSERS,
        "comfyui-gguf": f"ComfyUI-GGUF takes no CLIP text encoder from GGUF ({_CG}): give ComfyUI "
        "a .safetensors file",
    },
    notes=(
        "read by stable-diffusion.cpp (--clip_l, --clip_g); ComfyUI takes CLIP as .safetensors",
    ),
)
_T5 = EncoderFile(
    architecture="t5encoder",
    layout="gguf",
    fields=_T5_FIELDS,
    defaults=t5_encoder.DEFAULTS,
    tokenizer="unigram",
    tables=(
        Keep(
            r"relative_attention_bias\.", "table of distances: F32", "llama.cpp src/llama-quant.cpp"
        ),
    ),
    embedding=r"^shared\.weight$",
    families=(
        Family("v", r"SelfAttention\.v\.weight$"),
        Family("ffn_down", r"DenseReluDense\.wo\.weight$"),
    ),
    targets=_LANGUAGE,
    unread=_NO_DIFFUSERS,
)
_QWEN_FAMILIES = (
    Family("v", r"\.v_proj\.weight$"),
    Family("ffn_down", r"mlp\.down_proj\.weight$"),
)
_QWEN3 = EncoderFile(
    architecture="qwen3",
    layout="gguf",
    fields=_QWEN_FIELDS,
    defaults=qwen3_text.DEFAULTS,
    tokenizer="bpe",
    tables=(),
    embedding=r"^(model\.embed_tokens|lm_head)\.weight$",
    families=_QWEN_FAMILIES,
    targets=_LANGUAGE,
    unread=_NO_DIFFUSERS,
)

ENCODER_FILES: dict[str, EncoderFile] = {
    "t5_encoder": _T5,
    "clip_text": _CLIP,
    "openclip_text": replace(_CLIP, defaults=_without(BIGG_DEFAULTS, *_SIZES)),
    "qwen2_vl_text": EncoderFile(
        architecture="qwen2vl",
        layout="gguf",
        fields=(*_QWEN_FIELDS, Field(".rope.dimension_sections", "i32", _sections)),
        defaults=_without(qwen2_vl_text.DEFAULTS, "num_attention_heads", "num_key_value_heads"),
        implied=_qwen_heads,
        tokenizer="bpe",
        tables=(),
        embedding=_QWEN3.embedding,
        families=_QWEN_FAMILIES,
        targets=_LANGUAGE,
        unread=_NO_DIFFUSERS,
    ),
    "qwen2_vl_vision": EncoderFile(
        architecture="clip",
        layout="gguf",
        type="mmproj",
        fields=_TOWER_FIELDS,
        defaults=_TOWER_DEFAULTS,
        tokenizer="",
        tables=(Keep(r"patch_embed\.proj\.", "patch embedding: F32", "llama.cpp MmprojModel"),),
        embedding="",
        families=(Family("ffn_down", r"mlp\.down_proj\.weight$"),),
        targets=_LANGUAGE,
        unread=_NO_DIFFUSERS,
        notes=(
            "ComfyUI-GGUF finds this file in the encoder's folder by name: it must contain mmproj, "
            "and the encoder's name without its quant suffix",
        ),
    ),
    "qwen3_text": _QWEN3,
}
