"""Fast twin of codecs/q5_0.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import affine_weights, blocks
from diffquant.quant.codecs.numba import symmetric_lanes as search
from diffquant.quant.codecs.numba.affine_lanes import load
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import truncate
from diffquant.quant.codecs.numba.importance import lane_columns, weigh
from diffquant.quant.codecs.numba.lanes import LANES, scratch

__all__ = ["decode", "encode"]

_TOP = np.int32(31)
_LOW = np.int32(15)
_ZERO_LEVEL = np.int32(16)
_ROUND = np.float32(16.5)


@inlined
def _level(scaled: np.float32) -> np.int32:
    level = truncate(np.float32(scaled + _ROUND))
    return level if level < _TOP else _TOP


@kernel
def _encode_kernel(weight: Float32, packed: Bytes) -> None:
    for b in range(weight.shape[0]):
        scale = np.float32(blocks.peak(weight, b) / np.float32(-16))
        blocks.store_half(packed, b, 0, scale)
        inverse = blocks.inverse(scale)
        fifth = np.uint32(0)
        for j in range(16):
            low = _level(np.float32(weight[b, j] * inverse))
            high = _level(np.float32(weight[b, 16 + j] * inverse))
            fifth |= np.uint32(blocks.fifth_bit(low, j) | blocks.fifth_bit(high, 16 + j))
            packed[b, 6 + j] = np.uint8(np.int32(low & _LOW) | np.int32(high << np.int32(4)))
        blocks.store_word(packed, b, 2, fifth)


@kernel
def _encode_weighted_kernel(
    weight: Float32,
    packed: Bytes,
    sigma2: Float32,
    columns: Float32,
    grid: Float32,
    state: Float32,
) -> None:
    period = weight.shape[0] // sigma2.shape[0]
    for start in range(0, weight.shape[0], LANES):
        count = min(LANES, weight.shape[0] - start)
        load(weight, start, count, grid)
        weigh(grid, state, weight.shape[1], sigma2, period, columns, start)
        search.search(grid, state, weight.shape[1], np.float32(_ZERO_LEVEL), True)
        for k in range(count):
            b = start + k
            blocks.store_half(packed, b, 0, state[search.SCALE, k])
            iscale = state[search.FIT_ISCALE, k]
            if search.is_empty(state[search.PEAK, k]):
                packed[b, :] = 0
                continue
            fifth = np.uint32(0)
            for j in range(16):
                low = search.clipped_level(np.float32(iscale * weight[b, j]), _ZERO_LEVEL)
                high = search.clipped_level(np.float32(iscale * weight[b, 16 + j]), _ZERO_LEVEL)
                fifth |= blocks.fifth_bit(np.int32(low), j)
                fifth |= blocks.fifth_bit(np.int32(high), 16 + j)
                packed[b, 6 + j] = np.uint8((low & np.uint8(15)) | np.uint8(high << np.uint8(4)))
            blocks.store_word(packed, b, 2, fifth)


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        scale = blocks.load_half(packed, b, 0)
        fifth = blocks.load_word(packed, b, 2)
        for j in range(16):
            low = np.int32(packed[b, 6 + j] & np.uint8(15))
            high = np.int32(packed[b, 6 + j] >> np.uint8(4))
            low |= np.int32(np.uint32(fifth >> np.uint32(j)) & np.uint32(1)) << np.int32(4)
            high |= np.int32(np.uint32(fifth >> np.uint32(j + 16)) & np.uint32(1)) << np.int32(4)
            weight[b, j] = np.float32(np.int32(low - _ZERO_LEVEL)) * scale
            weight[b, 16 + j] = np.float32(np.int32(high - _ZERO_LEVEL)) * scale


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    weight = rows.reshape(-1, 32)
    packed = np.empty((len(weight), 22), np.uint8)
    sigma2 = affine_weights.mean_squares(rows, rows.shape[1])
    grid, state = scratch(3 * 32), scratch(search.STATE_ROWS)
    _encode_weighted_kernel(weight, packed, sigma2, lane_columns(importance, 32), grid, state)
    return packed


encode, decode = row_codec(
    blocks.encoder(_encode_kernel, 22), blocks.decoder(_decode_kernel, 32), _encode_weighted
)
