"""Fast twin of codecs/q4_0.py."""

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

_TOP = np.int32(15)
_ZERO_LEVEL = np.int32(8)
_ROUND = np.float32(8.5)


@inlined
def _level(scaled: np.float32) -> np.int32:
    level = truncate(np.float32(scaled + _ROUND))
    return level if level < _TOP else _TOP


@kernel
def _encode_kernel(weight: Float32, packed: Bytes) -> None:
    for b in range(weight.shape[0]):
        scale = np.float32(blocks.peak(weight, b) / np.float32(-8))
        blocks.store_half(packed, b, 0, scale)
        inverse = blocks.inverse(scale)
        for j in range(16):
            low = _level(np.float32(weight[b, j] * inverse))
            high = _level(np.float32(weight[b, 16 + j] * inverse))
            packed[b, 2 + j] = np.uint8(low | np.int32(high << np.int32(4)))


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
            for j in range(16):
                low = search.clipped_level(np.float32(iscale * weight[b, j]), _ZERO_LEVEL)
                high = search.clipped_level(np.float32(iscale * weight[b, 16 + j]), _ZERO_LEVEL)
                packed[b, 2 + j] = np.uint8(low | np.uint8(high << np.uint8(4)))


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        scale = blocks.load_half(packed, b, 0)
        for j in range(16):
            low = np.int32(packed[b, 2 + j] & np.uint8(15))
            high = np.int32(packed[b, 2 + j] >> np.uint8(4))
            weight[b, j] = np.float32(np.int32(low - _ZERO_LEVEL)) * scale
            weight[b, 16 + j] = np.float32(np.int32(high - _ZERO_LEVEL)) * scale


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    weight = rows.reshape(-1, 32)
    packed = np.empty((len(weight), 18), np.uint8)
    sigma2 = affine_weights.mean_squares(rows, rows.shape[1])
    grid, state = scratch(3 * 32), scratch(search.STATE_ROWS)
    _encode_weighted_kernel(weight, packed, sigma2, lane_columns(importance, 32), grid, state)
    return packed


encode, decode = row_codec(
    blocks.encoder(_encode_kernel, 18), blocks.decoder(_decode_kernel, 32), _encode_weighted
)
