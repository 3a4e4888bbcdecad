"""Dialects: how an encoded weight is named, packed and scaled in a file.

A format (quant/formats.py) knows numbers, a dialect knows a file. `pack` says which tensors a
dialect writes for one encoded weight; `bind` (convert/logical.py) finds them again.

======= ============================================================================================
plain   `W` holds the numbers; nothing beside it
gguf    `W` holds ggml blocks
comfy   `L.weight`, `L.weight_scale` (float32; scales of blocks in tiles), `L.weight_scale_2`
        (nvfp4), `L.comfy_quant` (uint8 JSON)
        Comfy-Org/ComfyUI@0271a46:comfy/ops.py, comfy/quant_ops.py; released comfy-kitchen 0.2.40
bnb     `L.weight` uint8 (n, 1), `L.weight.absmax`, `L.weight.quant_map`,
        `L.weight.quant_state.bitsandbytes__nf4` (uint8 JSON)
        bitsandbytes 0.50.2 nn/modules.py:600-610, functional.py:545-578
======= ============================================================================================
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffquant.core.errors import PolicyError
from diffquant.core.tensors import TensorSpec
from diffquant.quant.formats import format_named

__all__ = [
    "COMFY_FORMATS",
    "DIALECTS",
    "GROUP_SIZES",
    "NF4_QUANT_STATE",
    "NF4_TABLE",
    "ORIGINAL_SHAPE",
    "Packed",
    "pack",
    "skip_conflicts",
]

Shape = tuple[int, ...]

# The 16 values of NF4, ascending; quantiles of a normal distribution scaled to [-1, 1].
# bitsandbytes 0.50.2 functional.py:788-805 (float32 values, as stored in quant_map).
NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_QUANT_STATE = ".quant_state.bitsandbytes__nf4"

# FORMATS name -> what comfy_quant calls it, and part -> ending of the key behind `L.`.
COMFY_FORMATS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "fp8_e4m3_scaled": ("float8_e4m3fn", {"scale": "weight_scale"}),
    "fp8_e5m2_scaled": ("float8_e5m2", {"scale": "weight_scale"}),
    "int8_tensor": ("int8_tensorwise", {"scale": "weight_scale"}),
    "int8_rowwise": ("int8_tensorwise", {"scale": "weight_scale"}),
    "fp8_e4m3_rowwise": ("float8_e4m3fn_rowwise", {"scale": "weight_scale"}),
    "fp8_e4m3_blockwise": ("float8_e4m3fn_blockwise", {"block_scale": "weight_scale"}),
    "int8_blockwise": ("int8_blockwise", {"block_scale": "weight_scale"}),
    "mxfp8": ("mxfp8", {"block_scale": "weight_scale"}),
    "nvfp4_comfy": (
        "nvfp4",
        {"block_scale": "weight_scale", "tensor_scale": "weight_scale_2"},
    ),
}
GROUP_SIZES = {"fp8_e4m3_blockwise": 128, "int8_blockwise": 128}  # said by the marker
# Key of the marker under which a padded weight's own shape is kept: loaders take theirs from the
# model and ignore it, we would otherwise read the padding as weights.
ORIGINAL_SHAPE = "orig_shape"


@dataclass(frozen=True, slots=True)
class Packed:
    """One tensor a dialect writes.

    Attributes:
        spec: as stored.
        part: the FORMATS part whose bytes it holds, or "" for constant bytes.
        constant: the bytes, when `part` is empty.
    """

    spec: TensorSpec
    part: str
    constant: bytes = b""


def _plain(key: str, fmt: str, shape: Shape, _dtype: str) -> tuple[Packed, ...]:
    part = format_named(fmt).parts[0]
    return (Packed(TensorSpec(key, part.dtype, part.shape(shape)), part.name),)


def _layer(key: str, dialect: str) -> str:
    if not key.endswith(".weight"):
        raise PolicyError(f"{key}: the {dialect} dialect packs layer weights only")
    return key.removesuffix(".weight")


def _json_tensor(key: str, value: object) -> Packed:
    data = json.dumps(value).encode()
    return Packed(TensorSpec(key, "U8", (len(data),)), "", data)


def _comfy(key: str, fmt: str, shape: Shape, dtype: str) -> tuple[Packed, ...]:
    row = format_named(fmt)
    if fmt not in COMFY_FORMATS:
        return _plain(key, fmt, shape, dtype)
    layer = _layer(key, "comfy")
    name, endings = COMFY_FORMATS[fmt]
    marker: dict[str, object] = {"format": name}
    if fmt in GROUP_SIZES:
        marker["group_size"] = GROUP_SIZES[fmt]
    if row.is_padded and any(length % row.padding for length in shape):
        marker[ORIGINAL_SHAPE] = list(shape)
    return (
        *(
            Packed(
                TensorSpec(
                    f"{layer}.{endings.get(part.name, part.name)}", part.dtype, part.shape(shape)
                ),
                part.name,
            )
            for part in row.parts
        ),
        _json_tensor(f"{layer}.comfy_quant", marker),
    )


def _bnb(key: str, fmt: str, shape: Shape, dtype: str) -> tuple[Packed, ...]:
    if fmt != "nf4":
        return _plain(key, fmt, shape, dtype)
    _layer(key, "bnb")
    row = format_named(fmt)
    weight, absmax = row.parts
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(shape)}
    return (
        Packed(TensorSpec(key, "U8", (math.ceil(math.prod(shape) / 2), 1)), weight.name),
        Packed(TensorSpec(f"{key}.absmax", "F32", absmax.shape(shape)), absmax.name),
        Packed(TensorSpec(f"{key}.quant_map", "F32", (16,)), "", struct.pack("<16f", *NF4_TABLE)),
        _json_tensor(f"{key}{NF4_QUANT_STATE}", state),
    )


def skip_conflicts(kept: Iterable[str], packed: Iterable[str]) -> dict[str, str]:
    """Find kept modules whose entry in diffusers' skip list would hide a packed module too.

    An entry hides every module whose last name it equals, and every module below it: with Flux's
    own `proj_out` in the list, no `single_transformer_blocks.*.proj_out` would load packed.
    huggingface/diffusers@58eb52c:src/diffusers/quantizers/bitsandbytes/utils.py:53-63.

    Args:
        kept: module paths that are to stay unpacked.
        packed: module paths that are packed.

    Returns:
        kept module -> the first packed module it would hide.
    """
    names = tuple(packed)
    leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
    found = {}
    for entry in kept:
        below = next((name for name in names if f"{entry}." in name), "")
        if hidden := leaves.get(entry) or below:
            found[entry] = hidden
    return found


DIALECTS = {"plain": _plain, "gguf": _plain, "comfy": _comfy, "bnb": _bnb}

_TORCH_NAMES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def pack(dialect: str, key: str, fmt: str, shape: Shape, source: str) -> tuple[Packed, ...]:
    """Say what a dialect writes for one encoded weight.

    Args:
        dialect: DIALECTS name.
        key: the weight's full output key.
        fmt: FORMATS name.
        shape: logical shape.
        source: the source's cast format; bitsandbytes records it as the dtype to decode to.

    Raises:
        PolicyError: the dialect cannot hold the format under this key.
    """
    packed = DIALECTS[dialect](key, fmt, shape, _TORCH_NAMES.get(source, "float32"))
    lost = {part.name for part in format_named(fmt).parts} - {one.part for one in packed}
    if lost:  # without them the numbers could not be decoded again
        raise PolicyError(
            f"{key}: the {dialect} dialect has no place for the {' and '.join(sorted(lost))} of "
            f"{fmt}; choose another format or container for it"
        )
    return packed
