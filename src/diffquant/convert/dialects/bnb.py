"""bitsandbytes' 4-bit layers: one flat tensor, its absmax, its table and a quant state.

Keys: `L.weight` uint8 (n, 1), `L.weight.absmax`, `L.weight.quant_map`,
`L.weight.quant_state.bitsandbytes__nf4` (uint8 JSON). Source: bitsandbytes 0.50.2
nn/modules.py:600-610, functional.py:545-578.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

from diffquant.convert.dialects.packed import Packed, Shape, json_tensor, layer_of, plain
from diffquant.core.tensors import TensorSpec
from diffquant.quant.formats import format_named

__all__ = ["BNB_FORMATS", "NF4_QUANT_STATE", "NF4_TABLE", "pack_bnb", "skip_conflicts"]

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


BNB_FORMATS = frozenset({"nf4"})


def pack_bnb(key: str, fmt: str, shape: Shape, dtype: str) -> tuple[Packed, ...]:
    """Say what bitsandbytes reads for one weight; `dtype` is torch's name of what it decodes to."""
    if fmt != "nf4":
        return plain(key, fmt, shape, dtype)
    layer_of(key, "bnb")
    row = format_named(fmt)
    weight, absmax = row.parts
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(shape)}
    return (
        Packed(TensorSpec(key, "U8", (math.ceil(math.prod(shape) / 2), 1)), weight.name),
        Packed(TensorSpec(f"{key}.absmax", "F32", absmax.shape(shape)), absmax.name),
        Packed(TensorSpec(f"{key}.quant_map", "F32", (16,)), "", struct.pack("<16f", *NF4_TABLE)),
        json_tensor(f"{key}{NF4_QUANT_STATE}", state),
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
