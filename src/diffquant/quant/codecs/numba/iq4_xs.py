"""Fast twin of codecs/iq4_xs.py: eight super-blocks at a time, their 64 sub-blocks in search."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.iq4_search import VALUES
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba import iq4_lanes as search
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import nearest_int
from diffquant.quant.codecs.numba.lanes import LANES, scratch

__all__ = ["decode", "encode"]

_NBYTES = 136
_SUB = 8  # sub-blocks of a super-block
_BATCH = LANES // _SUB
_HALF = np.int32(32)
_TOP = np.int32(31)
_ZERO = np.float32(0)
_VALUES = VALUES


@inlined
def _store_scales(packed: Bytes, b: int, state: Float32, first: int) -> None:
    """Write the header of super-block `b`; its scales, rounded to 6 bits, are left inverted."""
    most = _ZERO  # the first scale of largest magnitude
    for j in range(_SUB):
        scale = state[search.SCALE, first + _BATCH * j]
        most = scale if abs(scale) > abs(most) else most
    d = np.float32(np.float32(-most) / np.float32(_HALF))
    inverse = blocks.inverse(d)
    blocks.store_half(packed, b, 0, d)
    for at in range(2, 8):
        packed[b, at] = np.uint8(0)
    for j in range(_SUB):
        lane = first + _BATCH * j
        step = nearest_int(np.float32(inverse * state[search.SCALE, lane]))
        step = step if step < _TOP else _TOP
        step = step if step > -_HALF else np.int32(-_HALF)
        state[search.INVERSE, lane] = blocks.inverse(np.float32(d * np.float32(step)))
        stored = np.uint8(np.int32(step + _HALF))
        packed[b, 2 + j // 4] |= np.uint8((stored >> np.uint8(4)) << np.uint8(2 * (j % 4)))
        packed[b, 4 + j // 2] |= np.uint8((stored & np.uint8(15)) << np.uint8(4 * (j % 2)))


@kernel
def _encode_kernel(
    weight: Float32, importance: Float32, packed: Bytes, grid: Float32, state: Float32
) -> None:
    nibbles = np.empty((search.NIBBLE_ROWS, LANES), np.uint8)
    for start in range(0, weight.shape[0], _BATCH):
        count = min(_BATCH, weight.shape[0] - start)
        search.load(weight, start, count, importance, grid, state)
        search.search(grid, state)
        for n in range(count):
            _store_scales(packed, start + n, state, n)
        search.pack(grid, state, nibbles)
        for n in range(count):
            for j in range(_SUB):
                for i in range(16):
                    packed[start + n, 8 + 16 * j + i] = nibbles[i, _BATCH * j + n]


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        d = blocks.load_half(packed, b, 0)
        for j in range(_SUB):
            upper = np.int32(packed[b, 2 + j // 4]) >> np.int32(2 * (j % 4))
            lower = np.int32(packed[b, 4 + j // 2]) >> np.int32(4 * (j % 2))
            step = (lower & np.int32(15)) | ((upper & np.int32(3)) << np.int32(4))
            scale = np.float32(d * np.float32(step - _HALF))
            for i in range(16):
                byte = packed[b, 8 + 16 * j + i]
                weight[b, 32 * j + i] = scale * _VALUES[byte & np.uint8(15)]
                weight[b, 32 * j + 16 + i] = scale * _VALUES[byte >> np.uint8(4)]


def _encode(weight: Float32, importance: Float32, packed: Bytes) -> None:
    grid, state = scratch(search.GRID_ROWS), scratch(search.STATE_ROWS)
    _encode_kernel(weight, importance, packed, grid, state)


encode, decode = row_codec(
    blocks.unweighted(_encode, 256, _NBYTES),
    blocks.decoder(_decode_kernel, 256),
    blocks.weighted(_encode, 256, _NBYTES),
)
