"""Parts a denoiser runs with, for files that do not hold them: what they are and how large.

Sizes follow from the published configs: a language model of width w, hidden width h, n layers and
a vocabulary of v has v w + n (attention + 3 w h) weights. Counts of the parts whose names and
shapes are at hand were taken from those (openai/clip-vit-large-patch14,
laion/CLIP-ViT-bigG-14-laion2B-39B-b160k, google/t5-v1_1-xxl's encoder, google/gemma-2-2b,
Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-4B, and the autoencoders); the others are the makers' own
totals of the models named in `source`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["COMPANIONS", "Companion", "EncoderSizes", "companions_of"]


@dataclass(frozen=True, slots=True)
class EncoderSizes:
    """Sizes of a text encoder that its activations follow from.

    Attributes:
        width: of its states.
        hidden: inside its feed-forward.
        vocabulary: rows of its token table.
    """

    kind: str
    width: int
    hidden: int
    layers: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Companion:
    """A text encoder.

    Attributes:
        name: key in COMPANIONS.
        title: for people.
        kind: PARTS key of files that hold it, "" where none is recognised.
        variant: of that kind.
        parameters: of the whole model.
        width: of its states.
        hidden: inside its feed-forward.
        layers: of them.
        vocabulary: rows of its token table.
        source: whose config or file says so.
    """

    name: str
    title: str
    kind: str
    variant: str
    parameters: int
    width: int
    hidden: int
    layers: int
    vocabulary: int
    source: str

    @property
    def sizes(self) -> EncoderSizes:
        """What its activations follow from."""
        return EncoderSizes(self.kind, self.width, self.hidden, self.layers, self.vocabulary)

    def serves(self, kind: str) -> bool:
        """Whether a part of that kind may be this one: OpenCLIP also has CLIP's names."""
        return kind == self.kind or (kind, self.kind) == ("clip_text", "openclip_text")


_ROWS = (
    Companion(
        "clip_l",
        "CLIP-L",
        "clip_text",
        "clip_l",
        123_060_480,
        768,
        3072,
        12,
        49408,
        "openai/clip-vit-large-patch14",
    ),
    Companion(
        "clip_g",
        "OpenCLIP-bigG",
        "openclip_text",
        "openclip_g",
        694_659_840,
        1280,
        5120,
        32,
        49408,
        "stabilityai/stable-diffusion-xl-base-1.0: text_encoder_2",
    ),
    Companion(
        "clip_h",
        "OpenCLIP-H",
        "openclip_text",
        "openclip_h",
        354_032_641,
        1024,
        4096,
        24,
        49408,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, text tower",
    ),
    Companion(
        "t5_xxl",
        "T5-XXL encoder",
        "t5_encoder",
        "t5_xxl",
        4_762_310_656,
        4096,
        10240,
        24,
        32128,
        "black-forest-labs/FLUX.1-dev: text_encoder_2",
    ),
    Companion(
        "umt5_xxl",
        "UMT5-XXL encoder",
        "t5_encoder",
        "umt5_xxl",
        5_680_910_336,
        4096,
        10240,
        24,
        256384,
        "google/umt5-xxl: config.json",
    ),
    Companion(
        "pile_t5_xl",
        "Pile-T5-XL encoder",
        "t5_encoder",
        "",
        1_223_527_424,
        2048,
        5120,
        24,
        32128,
        "EleutherAI/pile-t5-xl: config.json",
    ),
    Companion(
        "gemma2_2b",
        "Gemma 2 2B",
        "gemma2_text",
        "2b",
        2_614_341_888,
        2304,
        9216,
        26,
        256000,
        "google/gemma-2-2b",
    ),
    Companion(
        "qwen2_5_vl_7b",
        "Qwen2.5-VL 7B",
        "qwen2_vl_text",
        "7b",
        8_292_166_656,
        3584,
        18944,
        28,
        152064,
        "Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    Companion(
        "qwen2_5_vl_3b",
        "Qwen2.5-VL 3B",
        "qwen2_vl_text",
        "",
        3_754_622_976,
        2048,
        11008,
        36,
        151936,
        "Qwen/Qwen2.5-VL-3B-Instruct: model card",
    ),
    Companion(
        "qwen3_0_6b",
        "Qwen3 0.6B",
        "qwen3_text",
        "0.6b",
        596_049_920,
        1024,
        3072,
        28,
        151936,
        "Qwen/Qwen3-0.6B: config.json",
    ),
    Companion(
        "qwen3_4b",
        "Qwen3 4B",
        "qwen3_text",
        "4b",
        4_022_468_096,
        2560,
        9728,
        36,
        151936,
        "Qwen/Qwen3-4B: config.json",
    ),
    Companion(
        "qwen3_8b",
        "Qwen3 8B",
        "qwen3_text",
        "8b",
        8_190_735_360,
        4096,
        12288,
        36,
        151936,
        "Qwen/Qwen3-8B: config.json",
    ),
    Companion(
        "mistral3_24b",
        "Mistral Small 3 24B",
        "mistral_text",
        "24b",
        23_572_403_200,
        5120,
        32768,
        40,
        131072,
        "mistralai/Mistral-Small-24B-Base-2501: config.json",
    ),
    Companion(
        "llama3_8b",
        "Llama 3.1 8B",
        "",
        "",
        8_030_261_248,
        4096,
        14336,
        32,
        128256,
        "meta-llama/Llama-3.1-8B-Instruct: config.json",
    ),
    Companion(
        "chatglm3_6b",
        "ChatGLM3 6B",
        "",
        "",
        6_243_584_000,
        4096,
        13696,
        28,
        65024,
        "THUDM/chatglm3-6b: config.json",
    ),
)
COMPANIONS: Mapping[str, Companion] = {row.name: row for row in _ROWS}

# Architecture, or architecture and variant -> text encoders, None where unknown: the components
# each names in convert/architectures, and those that its files never hold. Pipelines of
# huggingface/diffusers@58eb52c (src/diffusers/pipelines/*) name the same.
_NEEDS: Mapping[str, tuple[str, ...] | None] = {
    "sd15": ("clip_l",),
    "sd2": ("clip_h",),
    "sdxl": ("clip_l", "clip_g"),
    "sdxl_refiner": ("clip_g",),
    "kolors": ("chatglm3_6b",),
    "sd3": ("clip_l", "clip_g", "t5_xxl"),
    "flux1": ("clip_l", "t5_xxl"),
    "chroma": ("t5_xxl",),
    "flux2": ("mistral3_24b",),
    "flux2 klein_4b": ("qwen3_4b",),
    "flux2 klein_9b": ("qwen3_8b",),
    "qwen_image": ("qwen2_5_vl_7b",),
    "z_image": ("qwen3_4b",),
    "lumina2": ("gemma2_2b",),
    "omnigen2": ("qwen2_5_vl_3b",),
    "hidream": ("clip_l", "clip_g", "t5_xxl", "llama3_8b"),
    "hidream o1": (),
    "pixart": ("t5_xxl",),
    "auraflow": ("pile_t5_xl",),
    "wan": ("umt5_xxl",),
    "ltx": ("t5_xxl",),
    "ltx 2": None,  # Gemma 3, of which no size is at hand
    "anima": ("qwen3_0_6b",),
    "hunyuan video": ("clip_l", "llama3_8b"),
}


def companions_of(architecture: str, variant: str) -> tuple[str, ...] | None:
    """Text encoders an architecture runs with; None where nobody here knows."""
    return _NEEDS.get(f"{architecture} {variant}", _NEEDS.get(architecture))
