"""Fast twin of codecs/iq4_nl.py: 64 blocks at a time."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.iq4_search import VALUES
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba import iq4_lanes as search
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.lanes import LANES, scratch

__all__ = ["decode", "encode"]

_NBYTES = 18
_VALUES = VALUES


@kernel
def _encode_kernel(
    weight: Float32, importance: Float32, packed: Bytes, grid: Float32, state: Float32
) -> None:
    nibbles = np.empty((search.NIBBLE_ROWS, LANES), np.uint8)
    for start in range(0, weight.shape[0], LANES):
        count = min(LANES, weight.shape[0] - start)
        search.load(weight, start, count, importance, grid, state)
        search.search(grid, state)
        for k in range(LANES):
            state[search.INVERSE, k] = blocks.inverse(state[search.SCALE, k])
        search.pack(grid, state, nibbles)
        for k in range(count):
            blocks.store_half(packed, start + k, 0, state[search.SCALE, k])
            for i in range(16):
                packed[start + k, 2 + i] = nibbles[i, k]


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        scale = blocks.load_half(packed, b, 0)
        for i in range(16):
            byte = packed[b, 2 + i]
            weight[b, i] = scale * _VALUES[byte & np.uint8(15)]
            weight[b, 16 + i] = scale * _VALUES[byte >> np.uint8(4)]


def _encode(weight: Float32, importance: Float32, packed: Bytes) -> None:
    grid, state = scratch(search.GRID_ROWS), scratch(search.STATE_ROWS)
    _encode_kernel(weight, importance, packed, grid, state)


encode, decode = row_codec(
    blocks.unweighted(_encode, 32, _NBYTES),
    blocks.decoder(_decode_kernel, 32),
    blocks.weighted(_encode, 32, _NBYTES),
)
