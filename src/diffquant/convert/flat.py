"""Read elements of weights that bitsandbytes packed flat, in blocks that run over row ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffquant.core.tensors import TensorSource, TensorSpec
from diffquant.quant.backends import backend
from diffquant.quant.codecs import fp4_bnb, nf4
from diffquant.quant.codecs.dynamic_map import DYNAMIC_MAP
from diffquant.quant.codecs.flat_blocks import BLOCK_SIZE

__all__ = ["FlatState", "Nested", "flat_state", "read_flat"]

_MODULES = {"nf4": nf4, "fp4": fp4_bnb}
_CODECS = {"nf4": "nf4", "fp4": "fp4_bnb"}


@dataclass(frozen=True, slots=True)
class Nested:
    """Absmax that are quantized themselves: `absmax = map[code] * nested_absmax + offset`."""

    absmax: str  # key of the float32 of each block of codes
    blocksize: int
    offset: float


@dataclass(frozen=True, slots=True)
class FlatState:
    """Where one weight's parts lie and how they belong together.

    Attributes:
        weight: key of the packed codes.
        absmax: key of the absmax, float32 or codes.
        kind: quant_type, nf4 or fp4.
        blocksize: elements per absmax.
        size: elements of the weight.
        nested: how absmax are decoded, None where they are float32.
    """

    weight: str
    absmax: str
    kind: str
    blocksize: int
    size: int
    nested: Nested | None = None


def flat_state(name: str, parts: Mapping[str, str], size: int, offset: float | None) -> FlatState:
    """The state of a weight whose format is a row of FORMATS: blocks of 64, nested of 256."""
    kind = "fp4" if name.startswith("fp4") else "nf4"
    nested = None
    if "nested_absmax" in parts and offset is not None:
        nested = Nested(parts["nested_absmax"], 256, offset)
    return FlatState(parts["weight"], parts["absmax"], kind, 64, size, nested)


def read_flat(source: TensorSource, state: FlatState, start: int, stop: int) -> NDArray[np.float32]:
    """Decode elements [start, stop) of the flattened weight."""
    block = state.blocksize
    first, last = start // block * block, min(-(-stop // block) * block, state.size)
    packed = _slice(source, state.weight, first // 2, -(-last // 2))
    absmax = _absmax(source, state, first // block, -(-last // block))
    shape = (1, last - first)
    if block == BLOCK_SIZE:
        codec = backend(_CODECS[state.kind], "decode")
        out: NDArray[np.float32] = codec(
            {"weight": packed, "absmax": absmax}, shape, fmt=state.kind
        ).reshape(-1)
    else:
        table = _MODULES[state.kind].CODE
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: last - first]
        out = table[codes] * np.repeat(absmax, block)[: last - first]
    return out[start - first : stop - first]


def _absmax(source: TensorSource, state: FlatState, first: int, last: int) -> NDArray[np.float32]:
    if state.nested is None:
        found: NDArray[np.float32] = source.read(state.absmax).view("<f4")[first:last]
        return np.ascontiguousarray(found)
    codes = source.read(state.absmax)[first:last]
    nested = source.read(state.nested.absmax).view("<f4")
    own = nested[np.arange(first, last) // state.nested.blocksize]
    absmax: NDArray[np.float32] = DYNAMIC_MAP[codes] * own + np.float32(state.nested.offset)
    return absmax


def _slice(source: TensorSource, key: str, start: int, stop: int) -> NDArray[np.uint8]:
    spec: TensorSpec = source.specs[key]
    if spec.row_nbytes == 1:  # (bytes, 1), as bitsandbytes stores it
        return source.read(key, (start, stop))
    return source.read(key)[start:stop]
