"""Fast twin of codecs/q3_k.py: 64 sub-blocks side by side in search.

Without importance, the encoder is five kernels over a chunk of super-blocks rather than one: each
search is compiled once. With importance, the scales of 64 super-blocks are searched in lanes too.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32, Int32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import affine_weights, blocks
from diffquant.quant.codecs.numba import descent_lanes as descent
from diffquant.quant.codecs.numba import symmetric_lanes as search
from diffquant.quant.codecs.numba.affine_lanes import load
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.importance import lane_columns, weigh
from diffquant.quant.codecs.numba.lanes import LANES, scratch

__all__ = ["decode", "encode"]

_SUB = 16  # sub-blocks of a super-block, and weights of a sub-block
_BATCH = LANES * _SUB  # sub-blocks of 64 super-blocks
_CHUNK = 512  # super-blocks that pass from kernel to kernel: their weights stay in the cache
_ZERO = np.float32(0)
_ONE = np.float32(1)
_HALF = np.int32(4)
_HALF_SCALE = np.int32(32)
_SCALES = np.float32(-32)
_LOWER_AT = 32
_SCALES_AT = 96
_UPPER_AT = 104
_D_AT = 108
_NBYTES = 110


@kernel
def _settle_kernel(
    sub_blocks: Float32, scale: Float32, picked: Int32, grid: Float32, state: Float32
) -> int:
    """Fit the first levels of (S, 16); returns how many were `picked` because levels may move."""
    moving = 0
    for first in range(0, sub_blocks.shape[0], LANES):
        count = min(LANES, sub_blocks.shape[0] - first)
        load(sub_blocks, first, count, grid)
        descent.settle(grid, state, _HALF)
        for k in range(count):
            scale[first + k] = state[descent.SCALE, k]
            if state[descent.MOVES, k] > _ZERO:
                picked[moving] = first + k
                moving += 1
    return moving


@kernel
def _descend_kernel(
    sub_blocks: Float32,
    picked: Int32,
    count: int,
    scale: Float32,
    kept: Bytes,
    grid: Float32,
    state: Float32,
) -> None:
    """Search the first `count` sub-blocks of `picked`: their scales, and their levels in `kept`."""
    for first in range(0, count, LANES):
        for k in range(LANES):
            s = picked[min(first + k, count - 1)]
            for i in range(_SUB):
                grid[i, k] = sub_blocks[s, i]
        descent.descend(grid, state, _HALF)
        for k in range(min(LANES, count - first)):
            s = picked[first + k]
            scale[s] = state[descent.SCALE, k]
            empty = search.is_empty(state[descent.PEAK, k])
            for i in range(_SUB):
                level = np.int32(np.int32(grid[descent.LEVEL + i, k]) + _HALF)
                kept[s, i] = np.uint8(0) if empty else np.uint8(level)


@inlined
def _round_scales(scale: Float32, at: int, level: Bytes) -> np.float32:
    """Six-bit levels of 16 scales against the largest; returns the size of a step."""
    most = _ZERO  # the first scale of largest magnitude
    for j in range(_SUB):
        most = scale[at + j] if abs(scale[at + j]) > abs(most) else most
    if most == _ZERO:
        level[:] = 0
        return _ZERO
    inverse = np.float32(_SCALES / most)
    for j in range(_SUB):
        level[j] = search.clipped_level(np.float32(inverse * scale[at + j]), _HALF_SCALE)
    return np.float32(_ONE / inverse)


@inlined
def _store_scales(packed: Bytes, b: int, level: Bytes) -> None:
    four, two = np.uint8(4), np.uint8(2)
    for j in range(8):
        packed[b, _SCALES_AT + j] = np.uint8((level[j] & np.uint8(15)) | (level[8 + j] << four))
    for j in range(4):
        upper = np.uint8((level[j] >> four) | ((level[4 + j] >> four) << two))
        upper |= np.uint8((level[8 + j] >> four) << four)
        packed[b, _UPPER_AT + j] = np.uint8(upper | ((level[12 + j] >> four) << np.uint8(6)))


@inlined
def _store_levels(packed: Bytes, b: int, level: Bytes) -> None:
    for i in range(32):
        third = np.uint8(0)
        for n in range(8):
            third |= np.uint8((level[32 * n + i] >> np.uint8(2)) << np.uint8(n))
        packed[b, i] = third
    three = np.uint8(3)
    for n in range(2):
        for i in range(32):
            lower = np.uint8(0)
            for q in range(4):
                two = np.uint8(level[128 * n + 32 * q + i] & three)
                lower |= np.uint8(two << np.uint8(2 * q))
            packed[b, _LOWER_AT + 32 * n + i] = lower


@inlined
def _store_header(
    packed: Bytes, b: int, d: np.float32, level: Bytes, divisor: Float32, at: int
) -> None:
    """Store d and the scales, and say what a weight will be divided by in each sub-block."""
    _store_scales(packed, b, level)
    blocks.store_half(packed, b, _D_AT, d)
    step = blocks.load_half(packed, b, _D_AT)
    for j in range(_SUB):
        divisor[at + j] = step * np.float32(np.int32(np.int32(level[j]) - _HALF_SCALE))


@inlined
def _store_weights(
    weight: Float32, packed: Bytes, b: int, divisor: Float32, kept: Bytes, level: Bytes
) -> None:
    for j in range(_SUB):
        for i in range(_SUB):
            scaled = np.float32(weight[b, _SUB * j + i] / divisor[j])
            level[_SUB * j + i] = search.clipped_level(scaled, _HALF)
    for j in range(_SUB):
        if divisor[j] == _ZERO:  # the levels that were searched stay
            for i in range(_SUB):
                level[_SUB * j + i] = kept[j, i]
    _store_levels(packed, b, level)


@kernel
def _header_kernel(scale: Float32, packed: Bytes, divisor: Float32, picked: Int32) -> int:
    """Store headers; returns how many sub-blocks were `picked` because theirs decode to scale 0."""
    level = np.empty(_SUB, np.uint8)
    zeros = 0
    for b in range(packed.shape[0]):
        d = _round_scales(scale, _SUB * b, level)
        _store_header(packed, b, d, level, divisor, _SUB * b)
        for j in range(_SUB * b, _SUB * (b + 1)):
            if divisor[j] == _ZERO:
                picked[zeros] = j
                zeros += 1
    return zeros


@kernel
def _weights_kernel(weight: Float32, packed: Bytes, divisor: Float32, kept: Bytes) -> None:
    level = np.empty(256, np.uint8)
    for b in range(packed.shape[0]):
        here = slice(_SUB * b, _SUB * (b + 1))
        _store_weights(weight, packed, b, divisor[here], kept[here], level)


@inlined
def _search_weighted(
    grid: Float32, state: Float32, size: int, first: int, scale_grid: Float32, fit: Float32
) -> None:
    """Search 64 sub-blocks, and hand their scales to the lanes of their super-blocks."""
    search.search(grid, state, size, np.float32(_HALF), True)
    for k in range(LANES):
        s = first + k
        total = _ZERO
        for i in range(size):
            total += grid[size + i, k]
        scale_grid[s % _SUB, s // _SUB] = state[search.SCALE, k]
        scale_grid[_SUB + s % _SUB, s // _SUB] = total
        fit[0, s] = state[search.FIT_ISCALE, k]
        fit[1, s] = state[search.PEAK, k]


@kernel
def _encode_weighted_kernel(
    weight: Float32,
    sub_blocks: Float32,
    sigma2: Float32,
    columns: Float32,
    packed: Bytes,
    grid: Float32,
    scale_grid: Float32,
    state: Float32,
) -> None:
    fit, divisor = np.empty((2, _BATCH), np.float32), np.empty(_BATCH, np.float32)
    kept, level = np.empty((_SUB, _SUB), np.uint8), np.empty(256, np.uint8)
    size = sub_blocks.shape[1]
    for start in range(0, sub_blocks.shape[0], _BATCH):
        count = min(_BATCH, sub_blocks.shape[0] - start)
        scale_grid[:] = _ZERO
        for first in range(0, count, LANES):
            load(sub_blocks, start + first, min(LANES, count - first), grid)
            weigh(grid, state, size, sigma2, _SUB, columns, start + first)
            _search_weighted(grid, state, size, first, scale_grid, fit)
        search.search(scale_grid, state, size, np.float32(_HALF_SCALE), True)
        for n in range(count // _SUB):
            b = start // _SUB + n
            empty = search.is_empty(state[search.PEAK, n])
            for j in range(_SUB):
                scaled = np.float32(state[search.FIT_ISCALE, n] * scale_grid[j, n])
                level[j] = np.uint8(0) if empty else search.clipped_level(scaled, _HALF_SCALE)
            _store_header(packed, b, state[search.SCALE, n], level, divisor, 0)
            for j in range(_SUB):
                s = _SUB * n + j
                if divisor[j] == _ZERO:
                    empty = search.is_empty(fit[1, s])
                    for i in range(_SUB):
                        scaled = np.float32(fit[0, s] * weight[b, _SUB * j + i])
                        kept[j, i] = np.uint8(0) if empty else search.clipped_level(scaled, _HALF)
            _store_weights(weight, packed, b, divisor, kept, level)


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    two = np.uint8(2)
    for b in range(packed.shape[0]):
        step = blocks.load_half(packed, b, _D_AT)
        for j in range(_SUB):
            nibble = np.uint8(packed[b, _SCALES_AT + j % 8] >> np.uint8(4 * (j // 8)))
            upper = np.uint8(packed[b, _UPPER_AT + j % 4] >> np.uint8(2 * (j // 4)))
            scale = np.int32((nibble & np.uint8(15)) | ((upper & np.uint8(3)) << np.uint8(4)))
            d = step * np.float32(np.int32(scale - _HALF_SCALE))
            half, quarter, at = j // 8, j // 2, _SUB * (j % 2)
            lower_at = _LOWER_AT + 32 * half + at
            for i in range(_SUB):
                lower = np.uint8(packed[b, lower_at + i] >> np.uint8(2 * (quarter % 4)))
                third = np.uint8(packed[b, at + i] >> np.uint8(quarter)) & np.uint8(1)
                level = np.int32((lower & np.uint8(3)) | np.uint8(third << two))
                weight[b, _SUB * j + i] = d * np.float32(np.int32(level - _HALF))


def _encode(weight: Float32) -> Bytes:
    packed = np.empty((len(weight), _NBYTES), np.uint8)
    size = _SUB * min(_CHUNK, len(weight))
    scale, divisor = np.empty(size, np.float32), np.empty(size, np.float32)
    picked, kept = np.empty(size, np.int32), np.empty((size, _SUB), np.uint8)
    grid, state = scratch(descent.GRID_ROWS), scratch(descent.STATE_ROWS)
    for start in range(0, len(weight), _CHUNK):
        blocks_here, packed_here = weight[start : start + _CHUNK], packed[start : start + _CHUNK]
        sub_blocks = blocks_here.reshape(-1, _SUB)
        count = _settle_kernel(sub_blocks, scale, picked, grid, state)
        _descend_kernel(sub_blocks, picked, count, scale, kept, grid, state)
        count = _header_kernel(scale, packed_here, divisor, picked)
        _descend_kernel(sub_blocks, picked, count, scale, kept, grid, state)
        _weights_kernel(blocks_here, packed_here, divisor, kept)
    return packed


def _encode_weighted(rows: Float32, importance: Float32) -> Bytes:
    weight = rows.reshape(-1, 256)
    packed = np.empty((len(weight), _NBYTES), np.uint8)
    grid, scale_grid = scratch(3 * _SUB), scratch(3 * _SUB)
    _encode_weighted_kernel(
        weight,
        rows.reshape(-1, _SUB),
        affine_weights.mean_squares(rows, 256, 2),
        lane_columns(importance, _SUB),
        packed,
        grid,
        scale_grid,
        scratch(search.STATE_ROWS),
    )
    return packed


encode, decode = row_codec(_encode, blocks.decoder(_decode_kernel, 256), _encode_weighted)
