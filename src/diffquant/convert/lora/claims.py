"""What an adapter file's header claims of its base model, and what its habits suggest.

Claims never outweigh shapes: they choose among models that fit alike, and a claim that the shapes
deny is a warning.

Sources: kohya-ss/sd-scripts@450630c:networks/ and library/sai_model_spec.py: ss_base_model_version,
ss_v2, modelspec; ostris/ai-toolkit:toolkit/metadata.py: sd_1.5, sd_2.1, sdxl_1.0;
lllyasviel/stable-diffusion-webui-forge:extensions-builtin/sd_forge_lora/network.py:52-68.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffquant.convert.recognise import modelspec_architectures

__all__ = ["Claim", "claims_of", "denied"]

# Beginnings of ss_base_model_version, lower case; the first that fits.
_VERSIONS = (
    ("sd_v1", ("sd15",)),
    ("sd_1", ("sd15",)),
    ("sd1", ("sd15",)),
    ("sd_v2", ("sd2",)),
    ("sd_2", ("sd2",)),
    ("sd2", ("sd2",)),
    ("sdxl_refiner", ("sdxl_refiner",)),
    ("sdxl", ("sdxl", "kolors")),
    ("sd3", ("sd3",)),
    ("flux1", ("flux1",)),
    ("flux.1", ("flux1",)),
    ("flux_1", ("flux1",)),
    ("flux2", ("flux2",)),
    ("flux.2", ("flux2",)),
    ("flux_2", ("flux2",)),
    ("chroma", ("chroma",)),
    ("lumina", ("lumina2",)),
    ("qwen_image", ("qwen_image",)),
    ("qwen-image", ("qwen_image",)),
    ("zimage", ("z_image",)),
    ("z_image", ("z_image",)),
    ("z-image", ("z_image",)),
    ("hunyuan", ("hunyuan",)),
    ("wan", ("wan",)),
    ("hidream", ("hidream",)),
    ("kolors", ("kolors",)),
    ("pixart", ("pixart",)),
    ("auraflow", ("auraflow",)),
    ("omnigen2", ("omnigen2",)),
    ("ltx", ("ltx",)),
    ("anima", ("anima",)),
)
_FLUX_REPOSITORY = "github.com/black-forest-labs/flux"


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement of the header: `key` says `text`, which means one of `architectures`."""

    key: str
    text: str
    architectures: tuple[str, ...]


def claims_of(metadata: Mapping[str, Any]) -> tuple[Claim, ...]:
    """Every statement about the base that is understood."""
    return tuple(claim for claim in _claims(metadata) if claim.architectures)


def _claims(metadata: Mapping[str, Any]) -> Iterator[Claim]:
    spec = _text(metadata, "modelspec.architecture")
    yield Claim("modelspec.architecture", spec, modelspec_architectures(spec))
    maker = _text(metadata, "modelspec.implementation")
    if maker.removesuffix("/").endswith(_FLUX_REPOSITORY):
        yield Claim("modelspec.implementation", maker, ("flux1", "chroma"))
    version = _text(metadata, "ss_base_model_version")
    lower = version.lower()
    meant = next((names for begin, names in _VERSIONS if lower.startswith(begin)), ())
    yield Claim("ss_base_model_version", version, meant)
    if _text(metadata, "ss_v2").lower() == "true":
        yield Claim("ss_v2", "True", ("sd2",))


def _text(metadata: Mapping[str, Any], key: str) -> str:
    value = metadata.get(key, "")
    return value if isinstance(value, str) else ""


def denied(claims: tuple[Claim, ...], architecture: str) -> tuple[str, ...]:
    """Warnings about claims that the shapes deny."""
    return tuple(
        f"{claim.key} says {claim.text:.60}, the layers are those of {architecture}: the layers "
        "are followed"
        for claim in claims
        if architecture not in claim.architectures
    )
