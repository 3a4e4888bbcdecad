"""bitsandbytes' layers: one flat tensor, its absmax, its table and a quant state; or int8 rows.

Four bits: `L.weight` uint8 (n, 1), `L.weight.absmax`, `L.weight.quant_map`,
`L.weight.quant_state.bitsandbytes__nf4` or `__fp4` (uint8 JSON); double quantization adds
`L.weight.nested_absmax`, `L.weight.nested_quant_map` and fields of the state. Eight bits:
`L.weight` int8 (N, K), `L.SCB` (N,), `L.weight_format` uint8 () 0. Source: bitsandbytes 0.50.2
nn/modules.py:600-610,1094-1117, functional.py:545-578.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from diffquant.convert.dialects.packed import (
    Packed,
    Shape,
    json_tensor,
    json_with_value,
    layer_of,
    plain,
)
from diffquant.core.tensors import TensorSpec
from diffquant.quant.codecs.dynamic_map import DYNAMIC_MAP
from diffquant.quant.codecs.fp4_bnb import CODE as FP4_TABLE
from diffquant.quant.codecs.nf4 import CODE as NF4_TABLE
from diffquant.quant.formats import format_named

__all__ = ["BNB_FORMATS", "FOUR_BITS", "QUANT_STATE", "TABLES", "pack_bnb", "skip_conflicts"]

QUANT_STATE = ".quant_state.bitsandbytes__"  # + quant_type
TABLES = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}
# FORMATS name -> quant_type, of blocks of 64.
FOUR_BITS: Mapping[str, str] = {"nf4": "nf4", "nf4_dq": "nf4", "fp4": "fp4", "fp4_dq": "fp4"}
BNB_FORMATS = frozenset({*FOUR_BITS, "int8_bnb"})


def pack_bnb(key: str, fmt: str, shape: Shape, dtype: str) -> tuple[Packed, ...]:
    """Say what bitsandbytes reads for one weight; `dtype` is torch's name of what it decodes to."""
    if fmt == "int8_bnb":
        return _int8(key, fmt, shape)
    if fmt not in FOUR_BITS:
        return plain(key, fmt, shape, dtype)
    layer_of(key, "bnb")
    row, kind = format_named(fmt), FOUR_BITS[fmt]
    named = {part.name: part for part in row.parts}
    state = {"quant_type": kind, "blocksize": 64, "dtype": dtype, "shape": list(shape)}
    packed = [
        Packed(TensorSpec(key, "U8", (math.ceil(math.prod(shape) / 2), 1)), "weight"),
        _companion(key, "absmax", named["absmax"].dtype, named["absmax"].shape(shape)),
        _table(f"{key}.quant_map", TABLES[kind]),
    ]
    if "nested_absmax" not in named:
        return (*packed, json_tensor(f"{key}{QUANT_STATE}{kind}", state))
    nested = named["nested_absmax"]
    packed += [
        _companion(key, "nested_absmax", nested.dtype, nested.shape(shape)),
        _table(f"{key}.nested_quant_map", DYNAMIC_MAP),
    ]
    state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
    marker = json_with_value(f"{key}{QUANT_STATE}{kind}", state, "nested_offset", "nested_offset")
    return (*packed, marker)


def _companion(key: str, part: str, dtype: str, shape: Shape) -> Packed:
    return Packed(TensorSpec(f"{key}.{part}", dtype, shape), part)


def _table(key: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Packed:
    return Packed(TensorSpec(key, "F32", values.shape), "", values.astype("<f4").tobytes())


def _int8(key: str, fmt: str, shape: Shape) -> tuple[Packed, ...]:
    layer = layer_of(key, "bnb")
    weight, scb = format_named(fmt).parts
    return (
        Packed(TensorSpec(key, weight.dtype, shape), weight.name),
        Packed(TensorSpec(f"{layer}.SCB", scb.dtype, scb.shape(shape)), scb.name),
        # 0: stored row by row, the only order that is still read.
        Packed(TensorSpec(f"{layer}.weight_format", "U8", ()), "", b"\0"),
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
