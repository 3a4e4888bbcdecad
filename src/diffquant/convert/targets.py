"""TARGETS: for which program an output is written, and what that program can read.

A target decides which formats may be written, what a row that fits none of them falls back to,
whether awkward rows may be stored as rows of 256 (only ComfyUI-GGUF restores the shape), and where
packed weights may sit. `universal` is what the four GGUF readers have in common. What a target
cannot read is refused with the reason, never written in the hope that it loads.

Sources (columns of docs/formats.md, "Targets"):
city96/ComfyUI-GGUF@795e451:dequant.py:7-13,24-28,287-301, ops.py, loader.py:12-24,57-91;
huggingface/diffusers@58eb52c:src/diffusers/quantizers/gguf/utils.py:136-168,501-516;
leejet/stable-diffusion.cpp@97d2990:src/model_loader.cpp, src/safetensors_io.cpp:79-101,209-324,
src/gguf_reader_ext.h:114-127 (scaled fp8: pull request 1913; int8 convrot: 1857);
lllyasviel/stable-diffusion-webui-forge@dfdcbab:backend/operations_gguf.py:6-16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from diffquant.convert.dialects.bnb import BNB_FORMATS
from diffquant.core.dtypes import STORAGE
from diffquant.core.errors import UnknownFormat, UsageError, shorten
from diffquant.quant.formats import FORMATS
from diffquant.quant.policy import FALLBACKS, FALLBACKS_WITHOUT_IQ

__all__ = [
    "DEFAULTS",
    "MAX_NAME_NBYTES",
    "TARGETS",
    "Stored",
    "Target",
    "candidates",
    "mixed_bnb",
    "target_named",
]

MAX_NAME_NBYTES = 127  # city96/ComfyUI-GGUF@795e451:tools/convert.py:12; ggml's 128 with its zero

Packs = Literal["linear", "layers", "anything"]
_WHERE: Mapping[Packs, str] = {
    "linear": "linear layers",
    "layers": "linear layers and 2-D convolutions",
    "anything": "any tensor",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as a target meets it.

    Attributes:
        key: full key in the output.
        format: FORMATS name, or the stored dtype in lower case.
        shape: the weight's own shape.
        layer: whether it is a layer's matrix or kernel: not a vector, table or raw parameter.
    """

    key: str
    format: str
    shape: tuple[int, ...]
    layer: bool


@dataclass(frozen=True, slots=True)
class Target:
    """One row of TARGETS.

    Attributes:
        name: what `--target` takes.
        about: one line for people.
        reads: container -> FORMATS names it reads there.
        otherwise: what it does with any other format.
        fallbacks: what a row takes whose length does not fit the wanted format.
        reshapes: whether it restores shapes from `comfy.gguf.orig_shape.*`.
        packs: where a packed weight may sit in a GGUF file; BF16 counts as packed.
        kernels_with_scales: whether it unpacks convolutions outside of GGUF.
        arrays_beside_5d: whether it reads array metadata in a file with a tensor of more than four
            dimensions.
    """

    name: str
    about: str
    reads: Mapping[str, frozenset[str]]
    otherwise: str
    fallbacks: Mapping[str, str]
    reshapes: bool = False
    packs: Packs = "linear"
    kernels_with_scales: bool = False
    arrays_beside_5d: bool = True

    def problems(self, container: str, tensors: Iterable[Stored]) -> tuple[str, ...]:
        """Say what of an output the target could not read; empty when it reads all of it."""
        tensors = tuple(tensors)
        found = [
            f"{len(keys)} tensors as {name} ({self.otherwise}): {shorten(keys, 2)}"
            for name, keys in self.unread(container, tensors).items()
        ]
        if container == "folder":
            found += mixed_bnb(tensors)
        if container != "gguf":
            if kernels := self.kernels(tensors):
                found.append(
                    f"{len(kernels)} packed convolutions (only linear layers are unpacked): "
                    f"{shorten(kernels, 2)}"
                )
            return tuple(found)
        if odd := self.misplaced(tensors):
            found.append(
                f"{len(odd)} packed or BF16 tensors that are not {self.place}: {shorten(odd, 2)}"
            )
        if long := [one.key for one in tensors if len(one.key.encode()) > MAX_NAME_NBYTES]:
            found.append(f"names over {MAX_NAME_NBYTES} bytes: {', '.join(long)}")
        return tuple(found)

    def unread(self, container: str, tensors: Iterable[Stored]) -> dict[str, list[str]]:
        """Format the target does not read in such a container -> keys stored so."""
        found: dict[str, list[str]] = {}
        for one in tensors:
            if one.format not in self.reads[container] and one.format.upper() not in _PLAIN:
                found.setdefault(one.format, []).append(one.key)
        return found

    def kernels(self, tensors: Iterable[Stored]) -> list[str]:
        """Keys of convolutions with scales, where it is not known to unpack them."""
        if self.kernels_with_scales:
            return []
        return [one.key for one in tensors if len(one.shape) > 2 and one.format in _SCALED]

    def misplaced(self, tensors: Iterable[Stored]) -> list[str]:
        """Keys of a GGUF file that are packed, or BF16, where the target does not unpack."""
        return [one.key for one in tensors if not self._may_sit(one)]

    @property
    def place(self) -> str:
        """Where it unpacks, in words."""
        return _WHERE[self.packs]

    def _may_sit(self, one: Stored) -> bool:
        if self.packs == "anything" or one.format in ("f32", "f16") or one.format == "f64":
            return True
        if one.format != "bf16" and not STORAGE.get(one.format.upper(), STORAGE["F32"]).is_block:
            return True  # integers: copied, and never taken for packed
        return one.layer and len(one.shape) in ((2, 4) if self.packs == "layers" else (2,))


def mixed_bnb(tensors: Iterable[Stored]) -> list[str]:
    """Say where a folder mixes bitsandbytes' formats: a component's config has room for one."""
    kinds: dict[str, set[str]] = {}
    for one in tensors:
        if one.format in BNB_FORMATS:
            folder = one.key.partition("/")[0] if "/" in one.key else "the component"
            kinds.setdefault(folder, set()).add(one.format)
    return [
        f"{' and '.join(sorted(names))} side by side in {folder} (its config.json names one)"
        for folder, names in kinds.items()
        if len(names) > 1
    ]


# Integers and F64 of a source are copied, whatever the target: they are no weights.
_PLAIN = frozenset({"F64", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"})
_CASTS = frozenset({"f32", "f16", "bf16"})
_BLOCKS_32 = frozenset({"q4_0", "q4_1", "q5_0", "q5_1", "q8_0"})
_K_TYPES = frozenset({"q2_k", "q3_k", "q4_k", "q5_k", "q6_k"})
_FAST_IQ = frozenset({"iq4_nl", "iq4_xs"})

_COMFYUI_GGUF = _CASTS | _BLOCKS_32 | _K_TYPES | _FAST_IQ
_DIFFUSERS = _CASTS | _BLOCKS_32 | _K_TYPES | _FAST_IQ
_FORGE = _CASTS | _BLOCKS_32 | _K_TYPES
_GGML = _CASTS | frozenset(name.lower() for name, row in STORAGE.items() if row.is_block)

_ROTATED = frozenset(row.name for row in FORMATS.values() if row.rotation)

# Comfy-Org/ComfyUI@0271a46:comfy/quant_ops.py QUANT_ALGOS
_PLAIN_FP8 = frozenset({"fp8_e4m3", "fp8_e5m2"})
_SCALED = frozenset(FORMATS) - _CASTS - _PLAIN_FP8
_COMFYUI = _PLAIN_FP8 | {
    "fp8_e4m3_scaled",
    "fp8_e5m2_scaled",
    "int8_tensor",
    "int8_rowwise",
    *_ROTATED,
    "mxfp8",
    "nvfp4_comfy",
}
# silveroxides/ComfyUI-QuantOps README.md (its own words for the fp8 rows: work in progress)
_QUANTOPS = frozenset({"fp8_e4m3_rowwise", "fp8_e4m3_blockwise", "int8_blockwise"})

_ROWS = (
    Target(
        "universal",
        "every GGUF reader: ComfyUI-GGUF, diffusers, stable-diffusion.cpp, Forge",
        {"gguf": _COMFYUI_GGUF & _DIFFUSERS & _FORGE & _GGML},
        "not every GGUF reader has it: Forge and the documentation of diffusers know no IQ type",
        FALLBACKS_WITHOUT_IQ,
        arrays_beside_5d=False,
    ),
    Target(
        "comfyui-gguf",
        "ComfyUI with ComfyUI-GGUF",
        {"gguf": _COMFYUI_GGUF},
        "it has no kernel for it: numpy decodes it on every step, and ignores reshapes",
        FALLBACKS,
        reshapes=True,
        packs="layers",
    ),
    Target(
        "sdcpp",
        "stable-diffusion.cpp",
        {
            "gguf": _GGML,
            "safetensors": _CASTS
            | {"fp8_e4m3", "fp8_e4m3_scaled", "int8_rowwise"}
            | {name for name in _ROTATED if name.startswith("int8")},
        },
        "it has no such type",
        FALLBACKS,
        packs="anything",
        arrays_beside_5d=False,
    ),
    Target(
        "diffusers",
        "diffusers: from_single_file, or a folder",
        {
            "gguf": _DIFFUSERS,
            "safetensors": _CASTS | _PLAIN_FP8,
            "folder": _CASTS | _PLAIN_FP8 | BNB_FORMATS,
        },
        "it raises for the whole file",
        FALLBACKS,
    ),
    Target(
        "forge",
        "stable-diffusion-webui-forge",
        {"gguf": _FORGE, "safetensors": _CASTS | _PLAIN_FP8 | BNB_FORMATS - {"int8_bnb"}},
        "it has no such type",
        FALLBACKS_WITHOUT_IQ,
    ),
    Target(
        "comfyui",
        "ComfyUI's own loaders",
        {"safetensors": _CASTS | _COMFYUI},
        "it has no such layer",
        FALLBACKS,
    ),
    Target(
        "comfyui-quantops",
        "ComfyUI with the ComfyUI-QuantOps node, which loads files of convert_to_quant",
        {"safetensors": _CASTS | _COMFYUI | _QUANTOPS},
        "it has no such layer",
        FALLBACKS,
    ),
    Target(
        "diffquant",
        "diffquant alone: packed convolutions, of tiny autoencoders",
        {"safetensors": _CASTS | _COMFYUI | _QUANTOPS | BNB_FORMATS - {"int8_bnb"}},
        "no safetensors file has it",
        FALLBACKS,
        kernels_with_scales=True,
    ),
)

TARGETS: dict[str, Target] = {row.name: row for row in _ROWS}

# Without --target, the first that reads what the type writes: most readers first.
DEFAULTS: Mapping[str, tuple[str, ...]] = {
    "gguf": ("universal", "diffusers", "sdcpp"),
    "safetensors": ("comfyui", "forge", "comfyui-quantops"),
    "folder": ("diffusers",),
}


def target_named(name: str, container: str) -> Target:
    """Look up a target that reads `container`.

    Raises:
        UnknownFormat: with the known names and the closest.
        UsageError: the target does not read such a container.
    """
    if name not in TARGETS:
        raise UnknownFormat(name, TARGETS, what="target")
    target = TARGETS[name]
    if container not in target.reads:
        raise UsageError(
            f"target {name} reads {' and '.join(target.reads)}, not {container}: change the "
            "extension of the output or --target"
        )
    return target


def candidates(name: str, container: str) -> tuple[Target, ...]:
    """Targets to try in order: the named one alone, else the container's defaults.

    Raises:
        UnknownFormat, UsageError: see `target_named`.
    """
    if name:
        return (target_named(name, container),)
    return tuple(TARGETS[one] for one in DEFAULTS[container])
