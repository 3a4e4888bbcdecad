"""Fast twin of codecs/q6_k.py: four super-blocks at a time, their 64 sub-blocks in search."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba import symmetric_lanes as search
from diffquant.quant.codecs.numba.affine_lanes import load
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import nearest_int
from diffquant.quant.codecs.numba.importance import lane_columns
from diffquant.quant.codecs.numba.lanes import LANES, scratch
from diffquant.quant.codecs.scale_search import GROUP_MAX_EPS

__all__ = ["decode", "encode"]

_SUB = 16  # sub-blocks of a super-block, and weights of a sub-block
_BATCH = LANES // _SUB
_ZERO = np.float32(0)
_ONE = np.float32(1)
_HALF = np.int32(32)
_MOST_SCALE = np.int32(127)
_SCALES = np.float32(-128)
_SCALES_AT = 192
_D_AT = 208
_NBYTES = 210


@inlined
def _weigh(grid: Float32, columns: Float32, start: int) -> None:
    first = start % (columns.shape[1] - LANES + 1)
    for i in range(_SUB):
        for k in range(LANES):
            grid[_SUB + i, k] = columns[i, first + k]


@inlined
def _largest(state: Float32, first: int) -> np.float32:
    most = _ZERO  # the first scale of largest magnitude
    for j in range(_SUB):
        scale = state[search.SCALE, first + j]
        most = scale if abs(scale) > abs(most) else most
    return most


@inlined
def _search_levels(
    weight: Float32, b: int, j: int, state: Float32, lane: int, level: Bytes
) -> None:
    # A scale that rounds to 0 keeps the levels that the search found, or 0 where it found nothing.
    empty = search.is_empty(state[search.PEAK, lane])
    for i in range(_SUB):
        scaled = np.float32(state[search.FIT_ISCALE, lane] * weight[b, _SUB * j + i])
        level[_SUB * j + i] = np.uint8(0) if empty else search.clipped_level(scaled, _HALF)


@inlined
def _store_levels(packed: Bytes, b: int, level: Bytes) -> None:
    low, two, four, six = np.uint8(15), np.uint8(2), np.uint8(4), np.uint8(6)
    for n in range(2):
        for i in range(32):
            at = 128 * n + i
            first, second, third, last = level[at], level[at + 32], level[at + 64], level[at + 96]
            packed[b, 64 * n + i] = np.uint8((first & low) | (third << four))
            packed[b, 64 * n + 32 + i] = np.uint8((second & low) | (last << four))
            upper = np.uint8((first >> four) | ((second >> four) << two))
            upper |= np.uint8(((third >> four) << four) | ((last >> four) << six))
            packed[b, 128 + 32 * n + i] = upper


@kernel
def _encode_kernel(
    weight: Float32,
    sub_blocks: Float32,
    columns: Float32,
    packed: Bytes,
    grid: Float32,
    state: Float32,
) -> None:
    # (B, 256) and the same as (16 B, 16); `columns` has no rows in the mode without importance.
    level, divisor = np.empty(256, np.uint8), np.empty(256, np.float32)
    weighted = columns.shape[0] > 0
    for start in range(0, weight.shape[0], _BATCH):
        count = min(_BATCH, weight.shape[0] - start)
        load(sub_blocks, _SUB * start, _SUB * count, grid)
        if weighted:
            _weigh(grid, columns, _SUB * start)
        search.search(grid, state, sub_blocks.shape[1], np.float32(_HALF), weighted)
        for n in range(count):
            b = start + n
            most = _largest(state, _SUB * n)
            if abs(most) < GROUP_MAX_EPS:
                packed[b, :] = 0
                continue
            inverse = np.float32(_SCALES / most)
            blocks.store_half(packed, b, _D_AT, np.float32(_ONE / inverse))
            step = blocks.load_half(packed, b, _D_AT)
            for j in range(_SUB):
                scale = nearest_int(np.float32(inverse * state[search.SCALE, _SUB * n + j]))
                scale = scale if scale < _MOST_SCALE else _MOST_SCALE
                packed[b, _SCALES_AT + j] = np.uint8(scale)
                for i in range(_SUB):
                    divisor[_SUB * j + i] = np.float32(step * np.float32(np.int8(scale)))
            for i in range(256):
                level[i] = search.clipped_level(np.float32(weight[b, i] / divisor[i]), _HALF)
            for j in range(_SUB):
                if divisor[_SUB * j] == _ZERO:
                    _search_levels(weight, b, j, state, _SUB * n + j, level)
            _store_levels(packed, b, level)


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    d = np.empty(_SUB, np.float32)
    for b in range(packed.shape[0]):
        step = blocks.load_half(packed, b, _D_AT)
        for j in range(_SUB):
            d[j] = step * np.float32(np.int8(packed[b, _SCALES_AT + j]))
        for j in range(_SUB):
            half, quarter, part = j // 8, j // 2 % 4, j % 2
            nibbles = 64 * half + 32 * (quarter % 2) + _SUB * part
            upper = 128 + 32 * half + _SUB * part
            down, away = np.int32(4 * (quarter // 2)), np.int32(2 * quarter)
            for i in range(_SUB):
                nibble = np.int32(np.int32(packed[b, nibbles + i]) >> down) & np.int32(15)
                bits = np.int32(np.int32(packed[b, upper + i]) >> away) & np.int32(3)
                level = np.int32(np.int32(nibble) | np.int32(np.int32(bits) << np.int32(4)))
                weight[b, _SUB * j + i] = d[j] * np.float32(np.int32(level - _HALF))


def _pack(rows: Float32, columns: Float32) -> Bytes:
    weight = rows.reshape(-1, 256)
    packed = np.empty((len(weight), _NBYTES), np.uint8)
    grid, state = scratch(3 * _SUB), scratch(search.STATE_ROWS)
    _encode_kernel(weight, rows.reshape(-1, _SUB), columns, packed, grid, state)
    return packed


def _encode(blocks: Float32) -> Bytes:
    return _pack(blocks, np.empty((0, LANES), np.float32))


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    return _pack(rows, lane_columns(importance, _SUB))


encode, decode = row_codec(_encode, blocks.decoder(_decode_kernel, 256), _encode_weighted)
