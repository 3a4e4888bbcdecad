"""InversionReport: a textual inversion's vectors, the encoders they are for, and its trigger.

    emb_params                       (n, width)   A1111 and ComfyUI, safetensors
    string_to_param.*                (n, width)   A1111's pickle; its `name` is the trigger
    <token>                          (width,)     Diffusers: the key is the trigger
    clip_l, clip_g, t5xxl            (n, width)   several encoders at once: SDXL, SD3, Flux
    text_encoders_0, text_encoders_1 (n, width)   Diffusers' dreambooth scripts

Sources: AUTOMATIC1111/stable-diffusion-webui:modules/textual_inversion/textual_inversion.py;
Comfy-Org/ComfyUI@17358c8:comfy/sd1_clip.py, load_embed; diffusers 0.42.1 (package),
loaders/textual_inversion.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffquant.core.tensors import TensorSpec
from diffquant.inspect.subject import Subject

__all__ = ["InversionReport", "TokenVectors", "describe_inversion"]

# Width -> (encoder, architecture of a file with vectors of that width alone).
_WIDTHS = {
    768: ("CLIP-L", "sd15"),
    1024: ("OpenCLIP-H", "sd2"),
    1280: ("CLIP-G", "sdxl"),
    4096: ("T5-XXL", "flux1"),
    3584: ("Qwen2.5-VL", "qwen_image"),
    2560: ("Qwen3", "z_image"),
}
# Encoders together -> architectures, the likeliest first.
_TOGETHER: tuple[tuple[frozenset[int], tuple[str, ...]], ...] = (
    (frozenset({768, 1280, 4096}), ("sd3", "hidream")),
    (frozenset({768, 1280}), ("sdxl", "sd3")),
    (frozenset({768, 4096}), ("flux1",)),
)
_OTHERS = {
    "sd15": ("sdxl", "flux1"),
    "sdxl": ("sd3",),
    "flux1": ("sd3", "chroma"),
}
_GENERIC = ("emb_params", "*", "clip_l", "clip_g", "t5xxl")
_WORST_VECTORS = 75  # a prompt's length in CLIP


@dataclass(frozen=True, slots=True)
class TokenVectors:
    """Vectors of one token for one encoder; `encoder` is "" for a width that none has."""

    key: str
    vectors: int
    width: int
    encoder: str


@dataclass(frozen=True, slots=True)
class InversionReport:
    """What one textual inversion is.

    Attributes:
        tokens: per key.
        base: architecture, or "unknown".
        also: others that have the same encoder.
        trigger: the word that calls it up.
        trigger_from: where that is from: "key", "name" in the file, or "file name".
        steps, trained_on: as the file says.
        evidence: what was concluded from what.
        warnings: what a user should know.
    """

    tokens: tuple[TokenVectors, ...]
    base: str
    also: tuple[str, ...]
    trigger: str
    trigger_from: str
    steps: str
    trained_on: str
    evidence: tuple[str, ...]
    warnings: tuple[str, ...]


def describe_inversion(subject: Subject) -> InversionReport:
    """Describe a textual inversion."""
    tokens = tuple(_vectors(spec) for spec in subject.source.specs.values() if spec.shape)
    widths = frozenset(one.width for one in tokens)
    base, also = _base(widths)
    trigger, origin = _trigger(subject, tokens)
    evidence = [
        f"{one.vectors} vectors of {one.width}, the width of {one.encoder}"
        for one in tokens
        if one.encoder
    ]
    if also:
        evidence.append(f"{', '.join(also)} have such an encoder as well: the header cannot tell")
    return InversionReport(
        tokens=tokens,
        base=base,
        also=also,
        trigger=trigger,
        trigger_from=origin,
        steps=_text(subject, "step"),
        trained_on=_text(subject, "sd_checkpoint_name"),
        evidence=tuple(evidence),
        warnings=tuple(_warnings(tokens)),
    )


def _vectors(spec: TensorSpec) -> TokenVectors:
    width = spec.shape[-1]
    encoder = _WIDTHS.get(width, ("", ""))[0]
    return TokenVectors(spec.key, spec.size // max(width, 1), width, encoder)


def _base(widths: frozenset[int]) -> tuple[str, tuple[str, ...]]:
    for together, slugs in _TOGETHER:
        if widths == together:
            return slugs[0], slugs[1:]
    if len(widths) == 1 and (row := _WIDTHS.get(next(iter(widths)))) is not None:
        return row[1], _OTHERS.get(row[1], ())
    return "unknown", ()


def _trigger(subject: Subject, tokens: tuple[TokenVectors, ...]) -> tuple[str, str]:
    for one in tokens:
        key = one.key.removeprefix("string_to_param.")
        if key not in _GENERIC and not key.startswith("text_encoders_"):
            return key, "key"
    if name := _text(subject, "name"):
        return name, "name"
    stem = Path(subject.path).stem
    return stem, "file name" if stem else ""


def _text(subject: Subject, key: str) -> str:
    value = subject.source.metadata.get(key, "")
    return str(value)[:120] if isinstance(value, str | int | float) else ""


def _warnings(tokens: tuple[TokenVectors, ...]) -> Iterator[str]:
    for one in tokens:
        if not one.encoder:
            yield f"{one.key}: vectors of {one.width}, which no known text encoder has"
        if not one.vectors:
            yield f"{one.key}: no vectors in it"
        elif one.vectors > _WORST_VECTORS:
            yield f"{one.key}: {one.vectors} vectors, a prompt has room for {_WORST_VECTORS}"
    if len({one.vectors for one in tokens if one.key in _GENERIC}) > 1:
        yield "the encoders have different numbers of vectors"
