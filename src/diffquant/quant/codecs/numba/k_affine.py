"""Fast twin of codecs/k_affine.py: eight super-blocks at a time, their 64 sub-blocks in search."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.numba import affine_lanes as search
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.floats import nearest_int
from diffquant.quant.codecs.numba.lanes import LANES, scratch

__all__ = ["decode_super_blocks", "encode_super_blocks"]

_SUB = 8  # sub-blocks of a super-block
_BATCH = LANES // _SUB
_ZERO = np.float32(0)
_SIX_BITS = np.float32(63)


@inlined
def _load(weight: Float32, start: int, count: int, grid: Float32) -> None:
    # (count, 256) rows -> lanes; lanes beyond the last super-block are zero.
    for b in range(_BATCH):
        for j in range(_SUB):
            for i in range(32):
                lane = _SUB * b + j
                grid[i, lane] = weight[start + b, 32 * j + i] if b < count else _ZERO


@inlined
def _six_bits(state: Float32, row: int, sign: np.float32, b: int, steps: Bytes) -> np.float32:
    """Round eight scales or minima to 6 bits against the largest; returns the size of a step."""
    most = _ZERO
    for j in range(_SUB):
        value = np.float32(sign * state[row, _SUB * b + j])
        most = value if value > most else most
    inverse = np.float32(_SIX_BITS / most) if most > _ZERO else _ZERO
    for j in range(_SUB):
        value = np.float32(sign * state[row, _SUB * b + j])
        step = np.uint8(nearest_int(np.float32(inverse * value)))
        steps[j] = step if step < np.uint8(63) else np.uint8(63)
    return np.float32(most / _SIX_BITS)


@inlined
def _store_scales(packed: Bytes, b: int, scale: Bytes, low: Bytes) -> None:
    for j in range(4):
        packed[b, 4 + j] = np.uint8(scale[j] | ((scale[j + 4] >> np.uint8(4)) << np.uint8(6)))
        packed[b, 8 + j] = np.uint8(low[j] | ((low[j + 4] >> np.uint8(4)) << np.uint8(6)))
        packed[b, 12 + j] = np.uint8((scale[j + 4] & np.uint8(15)) | (low[j + 4] << np.uint8(4)))


@inlined
def _header_scales(packed: Bytes, b: int, d: Float32, minimum: Float32) -> None:
    """Read a header's eight scales and minima as floats."""
    scale_step = blocks.load_half(packed, b, 0)
    low_step = blocks.load_half(packed, b, 2)
    for j in range(4):
        first, second, third = packed[b, 4 + j], packed[b, 8 + j], packed[b, 12 + j]
        d[j] = scale_step * np.float32(first & np.uint8(63))
        minimum[j] = low_step * np.float32(second & np.uint8(63))
        upper = np.uint8((third & np.uint8(15)) | ((first >> np.uint8(6)) << np.uint8(4)))
        d[j + 4] = scale_step * np.float32(upper)
        upper = np.uint8((third >> np.uint8(4)) | ((second >> np.uint8(6)) << np.uint8(4)))
        minimum[j + 4] = low_step * np.float32(upper)


@inlined
def _clamp(level: np.int32, top: np.int32) -> np.uint8:
    level = level if level > np.int32(0) else np.int32(0)
    return np.uint8(level if level < top else top)


@inlined
def _quantize(
    weight: Float32, b: int, j: int, d: np.float32, minimum: np.float32, top: np.int32, level: Bytes
) -> None:
    for i in range(32):
        shifted = np.float32(weight[b, 32 * j + i] + minimum)
        level[j, i] = _clamp(nearest_int(np.float32(shifted / d)), top)


@inlined
def _search_levels(
    weight: Float32, b: int, j: int, state: Float32, lane: int, top: np.int32, level: Bytes
) -> None:
    # A scale that rounds to 0 keeps the levels that the search found.
    iscale, low = state[search.FIT_ISCALE, lane], state[search.FIT_LOW, lane]
    for i in range(32):
        shifted = np.float32(weight[b, 32 * j + i] - low)
        level[j, i] = _clamp(nearest_int(np.float32(iscale * shifted)), top)


@inlined
def _store_levels(packed: Bytes, b: int, five: bool, level: Bytes) -> None:
    at = 16
    if five:
        for i in range(32):
            bits = np.uint8(0)
            for j in range(_SUB):
                bits |= np.uint8((level[j, i] >> np.uint8(4)) << np.uint8(j))
            packed[b, 16 + i] = bits
        at = 48
    for p in range(4):
        for i in range(32):
            low, high = level[2 * p, i], level[2 * p + 1, i]
            packed[b, at + 32 * p + i] = np.uint8((low & np.uint8(15)) | (high << np.uint8(4)))


@kernel
def _encode_kernel(
    weight: Float32,
    packed: Bytes,
    grid: Float32,
    state: Float32,
    top: np.int32,
    first: np.float32,
    steps: int,
) -> None:
    scale, low = np.empty(_SUB, np.uint8), np.empty(_SUB, np.uint8)
    d, minimum = np.empty(_SUB, np.float32), np.empty(_SUB, np.float32)
    level = np.empty((_SUB, 32), np.uint8)
    for start in range(0, weight.shape[0], _BATCH):
        count = min(_BATCH, weight.shape[0] - start)
        _load(weight, start, count, grid)
        search.search(grid, state, top, first, steps)
        for n in range(count):
            b = start + n
            step = _six_bits(state, search.SCALE, np.float32(1), n, scale)
            blocks.store_half(packed, b, 0, step)
            step = _six_bits(state, search.LOW, np.float32(-1), n, low)
            blocks.store_half(packed, b, 2, step)
            _store_scales(packed, b, scale, low)
            _header_scales(packed, b, d, minimum)
            for j in range(_SUB):
                if d[j] != _ZERO:
                    _quantize(weight, b, j, d[j], minimum[j], top, level)
                else:
                    _search_levels(weight, b, j, state, _SUB * n + j, top, level)
            _store_levels(packed, b, top > np.int32(15), level)


def encode_super_blocks(weight: Float32, packed: Bytes, top: int, first: float, steps: int) -> None:
    """Encode (B, 256) weights as (B, 144 or 176) bytes; 176 when `top` needs a fifth bit."""
    grid, state = scratch(search.GRID_ROWS), scratch(search.STATE_ROWS)
    _encode_kernel(weight, packed, grid, state, np.int32(top), np.float32(first), steps)


@kernel
def decode_super_blocks(packed: Bytes, weight: Float32) -> None:
    """Decode (B, 144 or 176) bytes as (B, 256) weights."""
    d, minimum = np.empty(_SUB, np.float32), np.empty(_SUB, np.float32)
    five = packed.shape[1] == 176
    at = 48 if five else 16
    for b in range(packed.shape[0]):
        _header_scales(packed, b, d, minimum)
        for p in range(4):
            for i in range(32):
                byte = packed[b, at + 32 * p + i]
                low, high = np.int32(byte & np.uint8(15)), np.int32(byte >> np.uint8(4))
                if five:
                    fifth = np.int32(packed[b, 16 + i]) >> np.int32(2 * p)
                    low |= np.int32(fifth & np.int32(1)) << np.int32(4)
                    high |= np.int32(fifth & np.int32(2)) << np.int32(3)
                scaled = np.float32(d[2 * p] * np.float32(np.int32(low)))
                weight[b, 64 * p + i] = np.float32(scaled - minimum[2 * p])
                scaled = np.float32(d[2 * p + 1] * np.float32(np.int32(high)))
                weight[b, 64 * p + 32 + i] = np.float32(scaled - minimum[2 * p + 1])
