"""TYPES: what a user names with -t: a policy, the containers it can go to, their dialects.

`q4_k_s` is a type, `q4_k` a format. Mixes are the peers' published ones
(city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:155-225), file type numbers llama.cpp's
(gguf-py 0.19.0 gguf/constants.py:4106-4149).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.quant.formats import FORMATS

__all__ = ["TYPES", "QuantType", "dialect_for", "type_named"]


@dataclass(frozen=True, slots=True)
class QuantType:
    """A named type.

    Attributes:
        name: as users type it.
        base: FORMATS name of everything the mix does not name.
        dialects: container ("gguf", "safetensors", "folder") -> dialect that writes it there.
        about: one line for `diffquant formats`.
        mix: family -> (count, format of the first count tensors, format of the rest).
        convs: whether convolutions are packed as well.
        file_type: llama.cpp's general.file_type, for GGUF.
    """

    name: str
    base: str
    dialects: Mapping[str, str]
    about: str
    mix: Mapping[str, tuple[int, str, str]] = field(default_factory=dict)
    convs: bool = False
    file_type: int | None = None

    @property
    def bits(self) -> float:
        """Bits per weight of the base format."""
        return FORMATS[self.base].bits


_GGUF = {"gguf": "gguf"}
_ANY = {"gguf": "gguf", "safetensors": "plain", "folder": "plain"}

_ROWS = (
    QuantType("f32", "f32", _ANY, "32-bit float", convs=True, file_type=0),
    QuantType("bf16", "bf16", _ANY, "bfloat16", convs=True, file_type=32),
    QuantType("f16", "f16", _ANY, "16-bit float", convs=True, file_type=1),
    QuantType("q8_0", "q8_0", _GGUF, "8 bits, blocks of 32", file_type=7),
    QuantType("q6_k", "q6_k", _GGUF, "6 bits, blocks of 256", file_type=18),
    QuantType(
        "q4_k_s",
        "q4_k",
        _GGUF,
        "4 bits, blocks of 256; value and down projections in q5_k as the peers' mix has it",
        mix={"v": (4, "q5_k", "q4_k"), "qkv": (0, "q4_k", "q4_k"), "ffn_down": (0, "q5_k", "q5_k")},
        file_type=14,
    ),
    QuantType(
        "q4_0",
        "q4_0",
        _GGUF,
        "4 bits, blocks of 32; down projections in q4_1 as the peers' mix has it",
        mix={"ffn_down": (0, "q4_1", "q4_1")},
        file_type=2,
    ),
    QuantType(
        "fp8_e4m3",
        "fp8_e4m3",
        {"safetensors": "plain", "folder": "plain"},
        "8-bit float without a scale, convolutions too",
        convs=True,
    ),
    QuantType(
        "fp8_scaled",
        "fp8_e4m3_scaled",
        {"safetensors": "comfy"},
        "8-bit float with one scale per layer (ComfyUI)",
    ),
    QuantType(
        "int8_rowwise",
        "int8_rowwise",
        {"safetensors": "comfy"},
        "8-bit integer with one scale per output row (ComfyUI int8_tensorwise)",
    ),
    QuantType(
        "nf4",
        "nf4",
        {"safetensors": "bnb", "folder": "bnb"},
        "4-bit normal float, blocks of 64 (bitsandbytes: Forge file, Diffusers folder)",
    ),
)

TYPES: dict[str, QuantType] = {row.name: row for row in _ROWS}


def type_named(name: str) -> QuantType:
    """Look a type up; case does not matter, as in llama-quantize.

    Raises:
        UnknownFormat: with the known names and the closest.
    """
    try:
        return TYPES[name.lower()]
    except KeyError:
        raise UnknownFormat(name, TYPES, what="type") from None


def dialect_for(kind: QuantType, container: str) -> str:
    """Return the dialect that writes `kind` into `container`.

    Raises:
        UsageError: no loader reads the type from such a container.
    """
    try:
        return kind.dialects[container]
    except KeyError:
        where = " or ".join(_SPELLING[name] for name in kind.dialects)
        raise UsageError(
            f"type {kind.name} cannot go into {_SPELLING[container]}: write it to {where}"
        ) from None


_SPELLING = {
    "gguf": "a .gguf file",
    "safetensors": "a .safetensors file",
    "folder": "a Diffusers folder",
}
