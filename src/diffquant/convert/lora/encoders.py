"""Text encoders in adapter files: which one it is, and which families have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from diffquant.convert.lora.bases import bases
from diffquant.convert.lora.group import Adapter
from diffquant.convert.templates import template

__all__ = ["ENCODERS", "Encoder", "EncoderRow", "alone", "encoder_of"]


@dataclass(frozen=True, slots=True)
class EncoderRow:
    """One encoder in circulation.

    Attributes:
        kind: slug: the variant that convert.architectures gives it.
        title: name for people.
        width: of its hidden states.
        families: architectures that have it, the likeliest first.
        names: templates that tell its family, dots or underscores between the words.
    """

    kind: str
    title: str
    width: int
    families: tuple[str, ...]
    names: str


_CLIP = "text_model.encoder.layers"
ENCODERS = (
    EncoderRow("clip_l", "CLIP-L", 768, ("sdxl", "flux1", "sd3", "sd15", "hidream"), _CLIP),
    EncoderRow("openclip_h", "OpenCLIP-H", 1024, ("sd2",), _CLIP),
    EncoderRow("openclip_g", "CLIP-G", 1280, ("sdxl", "sd3", "sdxl_refiner", "hidream"), _CLIP),
    EncoderRow(
        "t5_xxl",
        "T5-XXL",
        4096,
        ("flux1", "sd3", "chroma", "pixart", "ltx", "hidream"),
        "encoder.block",
    ),
    EncoderRow("umt5_xxl", "UMT5-XXL", 4096, ("wan",), "encoder.block"),
    EncoderRow("qwen2_vl_7b", "Qwen2.5-VL 7B", 3584, ("qwen_image", "omnigen2"), "layers"),
    EncoderRow("qwen3_4b", "Qwen3 4B", 2560, ("z_image", "flux2"), "layers"),
    EncoderRow("qwen3_8b", "Qwen3 8B", 4096, ("flux2",), "layers"),
    EncoderRow("gemma2_2b", "Gemma 2 2B", 2304, ("lumina2",), "layers"),
    EncoderRow("mistral_24b", "Mistral Small 24B", 5120, ("flux2",), "layers"),
)
_BY_KIND = {row.kind: row for row in ENCODERS}


@dataclass(frozen=True, slots=True)
class Encoder:
    """A text encoder that a file adapts.

    Attributes:
        kind: slug of a row of ENCODERS; "" where the width is none of theirs.
        title: name for people.
        layers: adapted layers that are its, by name and number.
        evidence: what was concluded from what.
    """

    kind: str
    title: str
    layers: int
    evidence: str


def encoder_of(adapters: Sequence[Adapter]) -> Encoder | None:
    """Recognise the encoder that these layers, all of one part, belong to; None for another."""
    named: Counter[int] = Counter()
    fitting: Counter[int] = Counter()
    rows = [one for one in bases() if not one.is_denoiser]
    for adapter in adapters:
        text, numbers = template(adapter.module)
        for base in rows:
            weights = base.weights(text, underscored=adapter.naming == "underscored")
            if (shape := weights.get(numbers)) is not None:
                named[base.index] += 1
                fitting[base.index] += all(size in (None, *shape) for size in adapter.shape)
    if not named:
        return None
    best = max(rows, key=lambda one: (fitting[one.index], named[one.index], -one.index))
    count = named[best.index]
    row = _BY_KIND[best.encoder]
    if fitting[best.index] * 2 > len(adapters):
        return Encoder(
            row.kind, row.title, count, f"{count} layers of {row.title}, {row.width} wide"
        )
    family = next((one.title for one in ENCODERS if one.names == row.names), row.title)
    family = {"CLIP-L": "CLIP", "T5-XXL": "T5"}.get(family, "language model")
    return Encoder("", family, count, f"{count} layers of a {family} of no known width")


def alone(kinds: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Families that have all these encoders, the likeliest first.

    Args:
        kinds: slugs of the encoders.
        names: modules as the file writes them; sd-scripts calls the encoder `lora_te_` where the
            model has one, `lora_te1_` where it has more.
    """
    known = [_BY_KIND[kind].families for kind in kinds if kind]
    if not known:
        return ()
    families = tuple(one for one in known[0] if all(one in row for row in known))
    single = [name for name in names if name.startswith("lora_te_")]
    if single and "sd15" in families:
        return ("sd15",)
    if any(name.startswith("lora_te1_") for name in names):
        return tuple(one for one in families if one != "sd15")
    return families
