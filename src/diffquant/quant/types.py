"""TYPES: what a user names with -t: a policy, the containers it can go to, their dialects.

`q4_k_s` is a type, `q4_k` a format. The mixes of the K types, q4_0 and q5_0 are the peers'
published ones (city96/ComfyUI-GGUF@795e451:tools/lcpp.patch:155-225; edge blocks: @4dfc025, branch
auto_convert). Nobody publishes a mix of an IQ type or of mxfp4 for image models: those are
one format throughout, which is our choice and labelled so. File type numbers are llama.cpp's
(gguf-py 0.19.0 gguf/constants.py:4106-4149).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffquant.core.errors import UnknownFormat, UsageError
from diffquant.quant.formats import FORMATS

__all__ = ["ALIASES", "TYPES", "QuantType", "dialect_for", "type_named"]


@dataclass(frozen=True, slots=True)
class QuantType:
    """A named type.

    Attributes:
        name: as users type it.
        base: FORMATS name of everything the mix does not name.
        dialects: container ("gguf", "safetensors", "folder") -> dialect that writes it there.
        about: one line for `diffquant formats`.
        mix: family -> (count, format of the first count tensors, format of the rest).
        edge: format of the first and the last block, where the architecture names such blocks;
            it overrides the mix, downwards too. "" where the published mix has no such rule.
        tuned: what `--policy tuned` puts over `mix`, where an architecture has tuned families.
        published: whether peers publish this mix; else the choice is ours.
        convs: whether convolutions are packed as well.
        file_type: llama.cpp's general.file_type, for GGUF.
    """

    name: str
    base: str
    dialects: Mapping[str, str]
    about: str
    mix: Mapping[str, tuple[int, str, str]] = field(default_factory=dict)
    edge: str = ""
    tuned: Mapping[str, tuple[int, str, str]] = field(default_factory=dict)
    published: bool = False
    convs: bool = False
    file_type: int | None = None

    @property
    def bits(self) -> float:
        """Bits per weight of the base format."""
        return FORMATS[self.base].bits

    @property
    def formats(self) -> frozenset[str]:
        """Every format the type asks for, before any fallback."""
        rows = (*self.mix.values(), *self.tuned.values())
        mixed = {name for _, early, late in rows for name in (early, late)}
        return frozenset({self.base, *mixed, *((self.edge,) if self.edge else ())})


_GGUF = {"gguf": "gguf"}
_ANY = {"gguf": "gguf", "safetensors": "plain", "folder": "plain"}


def _published(
    name: str,
    base: str,
    file_type: int,
    about: str,
    *,
    v: tuple[int, str, str] | str = "",
    qkv: str = "",
    down: str = "",
    edge: str = "",
    tuned_qkv: str = "",
) -> QuantType:
    """A GGUF type as the peers mix it; a family without a format has the base."""
    rows = {"v": v, "qkv": qkv, "ffn_down": down}
    mix = {
        family: (0, given, given) if isinstance(given, str) else given
        for family, given in rows.items()
        if given
    }
    tuned = {"qkv": (0, tuned_qkv, tuned_qkv)} if tuned_qkv else {}
    return QuantType(
        name, base, _GGUF, about, mix, edge, tuned, published=True, file_type=file_type
    )


def _uniform(name: str, file_type: int, about: str) -> QuantType:
    """A GGUF type that is one format throughout: ours, since no mix is published."""
    return QuantType(name, name, _GGUF, f"{about}; one format throughout", file_type=file_type)


_ROWS = (
    QuantType("f32", "f32", _ANY, "32-bit float", convs=True, file_type=0),
    QuantType("bf16", "bf16", _ANY, "bfloat16", convs=True, file_type=32),
    QuantType("f16", "f16", _ANY, "16-bit float", convs=True, file_type=1),
    _published("q8_0", "q8_0", 7, "8 bits, blocks of 32"),
    _published("q6_k", "q6_k", 18, "6 bits, blocks of 256"),
    _published(
        "q5_k_m",
        "q5_k",
        17,
        "5 bits; value, fused attention and down projections in q6_k",
        v="q6_k",
        qkv="q6_k",
        down="q6_k",
        edge="q6_k",
    ),
    _published("q5_k_s", "q5_k", 16, "5 bits, blocks of 256"),
    _published("q5_1", "q5_1", 9, "5 bits and a minimum, blocks of 32"),
    _published("q5_0", "q5_0", 8, "5 bits, blocks of 32; down projections in q5_1", down="q5_1"),
    _published(
        "q4_k_m",
        "q4_k",
        15,
        "4 bits; value and down projections in q6_k, fused attention in q5_k",
        v="q6_k",
        qkv="q5_k",
        down="q6_k",
        edge="q5_k",
    ),
    _published(
        "q4_k_s",
        "q4_k",
        14,
        "4 bits, blocks of 256; first value projections and all down projections in q5_k",
        v=(4, "q5_k", "q4_k"),
        down="q5_k",
        tuned_qkv="q5_k",
    ),
    _published("q4_1", "q4_1", 3, "4 bits and a minimum, blocks of 32"),
    _published("q4_0", "q4_0", 2, "4 bits, blocks of 32; down projections in q4_1", down="q4_1"),
    _published(
        "q3_k_l",
        "q3_k",
        13,
        "3 bits; value and down projections in q5_k, fused attention in q4_k",
        v="q5_k",
        qkv="q4_k",
        down="q5_k",
        edge="q4_k",
    ),
    _published(
        "q3_k_m",
        "q3_k",
        12,
        "3 bits; value (first two q5_k), fused attention and down projections in q4_k",
        v=(2, "q5_k", "q4_k"),
        qkv="q4_k",
        down="q4_k",
        edge="q4_k",
    ),
    _published("q3_k_s", "q3_k", 11, "3 bits, blocks of 256", edge="q4_k"),
    _published("q2_k", "q2_k", 10, "2 bits; value projections in q3_k", v="q3_k", edge="q4_k"),
    _uniform("iq4_nl", 25, "4 bits, 16 fixed levels, blocks of 32"),
    _uniform("iq4_xs", 30, "4 bits, 16 fixed levels, blocks of 256"),
    _uniform("iq3_s", 26, "3.4 bits from a table"),
    _uniform("iq3_xxs", 23, "3.1 bits from a table"),
    _uniform("iq2_s", 28, "2.6 bits from a table"),
    _uniform("iq2_xs", 20, "2.3 bits from a table"),
    _uniform("iq2_xxs", 19, "2.1 bits from a table"),
    _uniform("mxfp4", 38, "4-bit float, a power of two per 32 (ggml's)"),
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
        "fp8_e5m2",
        "fp8_e5m2",
        {"safetensors": "plain", "folder": "plain"},
        "8-bit float of wide range and two fraction bits, no scale, convolutions too",
        convs=True,
    ),
    QuantType(
        "fp8_e5m2_scaled",
        "fp8_e5m2_scaled",
        {"safetensors": "comfy"},
        "the same with one scale per layer, linear layers (ComfyUI)",
    ),
    QuantType(
        "int8_tensor",
        "int8_tensor",
        {"safetensors": "comfy"},
        "8-bit integer with one scale per layer (ComfyUI int8_tensorwise)",
    ),
    QuantType(
        "int8_rowwise",
        "int8_rowwise",
        {"safetensors": "comfy"},
        "8-bit integer with one scale per output row (ComfyUI int8_tensorwise)",
    ),
    QuantType(
        "int8_convrot",
        "int8_convrot",
        {"safetensors": "comfy"},
        "the same of rotated rows, which keeps outliers from costing the others (ComfyUI, sd.cpp)",
    ),
    QuantType(
        "asym_w4a8_int8",
        "asym_w4a8_int8",
        {"safetensors": "comfy"},
        "4 bits per weight on an int8 grid, rotated (ComfyUI W4A8; works where W4A4 breaks)",
    ),
    QuantType(
        "convrot_w4a4",
        "convrot_w4a4",
        {"safetensors": "comfy"},
        "4-bit integer with one scale per row, rotated (ComfyUI W4A4; breaks many models)",
    ),
    QuantType(
        "fp8_e4m3_rowwise",
        "fp8_e4m3_rowwise",
        {"safetensors": "comfy"},
        "8-bit float with one scale per output row (ComfyUI-QuantOps, not ComfyUI itself)",
    ),
    QuantType(
        "fp8_e4m3_blockwise",
        "fp8_e4m3_blockwise",
        {"safetensors": "comfy"},
        "8-bit float with one scale per 128 x 128 (ComfyUI-QuantOps, not ComfyUI itself)",
    ),
    QuantType(
        "int8_blockwise",
        "int8_blockwise",
        {"safetensors": "comfy"},
        "8-bit integer with one scale per 128 x 128 (ComfyUI-QuantOps, not ComfyUI itself)",
    ),
    QuantType(
        "mxfp8",
        "mxfp8",
        {"safetensors": "comfy"},
        "8-bit float with a power of two per 32 (ComfyUI; fast on Blackwell)",
    ),
    QuantType(
        "nvfp4",
        "nvfp4_comfy",
        {"safetensors": "comfy"},
        "4-bit float, an 8-bit scale per 16 and one per layer (ComfyUI; fast on Blackwell)",
    ),
    QuantType(
        "nf4",
        "nf4",
        {"safetensors": "bnb", "folder": "bnb"},
        "4-bit normal float, blocks of 64 (bitsandbytes: Forge file, Diffusers folder)",
    ),
    QuantType(
        "nf4_dq",
        "nf4_dq",
        {"safetensors": "bnb", "folder": "bnb"},
        "the same with its scales in 8 bits: 0.37 bits less (double quantization)",
    ),
    QuantType(
        "fp4",
        "fp4",
        {"safetensors": "bnb", "folder": "bnb"},
        "4-bit float, blocks of 64 (bitsandbytes); nf4 is closer at the same size",
    ),
    QuantType(
        "fp4_dq",
        "fp4_dq",
        {"safetensors": "bnb", "folder": "bnb"},
        "the same with its scales in 8 bits",
    ),
    QuantType(
        "int8_bnb",
        "int8_bnb",
        {"folder": "bnb"},
        "8-bit integer with one absmax per output row (bitsandbytes: Diffusers folder)",
    ),
)

TYPES: dict[str, QuantType] = {row.name: row for row in _ROWS}

# As llama-quantize has them: ggml-org/llama.cpp tools/quantize/quantize.cpp, QUANT_OPTIONS.
ALIASES = {
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "w4a8": "asym_w4a8_int8",
    "w4a4": "convrot_w4a4",
}


def type_named(name: str) -> QuantType:
    """Look a type or an alias up; case does not matter, as in llama-quantize.

    Raises:
        UnknownFormat: with the known names and the closest.
    """
    try:
        return TYPES[ALIASES.get(name.lower(), name.lower())]
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
