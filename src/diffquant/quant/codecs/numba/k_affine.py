"""Fast twin of codecs/k_affine.py: eight super-blocks at a time, their 64 sub-blocks in search."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffquant.quant.codecs.affine_search import WEIGHTED, Candidates
from diffquant.quant.codecs.arrays import Bytes, Float32, frozen
from diffquant.quant.codecs.numba import affine_lanes as search
from diffquant.quant.codecs.numba import affine_weights, blocks, positive_lanes, super_blocks
from diffquant.quant.codecs.numba.compile import inlined, kernel, merged
from diffquant.quant.codecs.numba.lanes import LANES, scratch

__all__ = ["decode_super_blocks", "encoder", "weighted_encoder"]

_SUB = 8  # sub-blocks of a super-block
_SIZE = 32  # weights of a sub-block
_BATCH = LANES // _SUB
_SIX_BITS = np.uint8(63)
_FIRST = np.float32(WEIGHTED.first)
_STEP = np.float32(WEIGHTED.step)
_STEPS = WEIGHTED.steps


@merged
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


@merged
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


@merged
def _store(
    rows: Float32, packed: Bytes, b: int, scale: Bytes, low: Bytes, state: Float32, top: np.int32
) -> None:
    # The halves stand in `packed` already.
    d, minimum = np.empty(_SUB, np.float32), np.empty(_SUB, np.float32)
    level = np.empty((_SUB, _SIZE), np.uint8)
    _store_scales(packed, b, scale, low)
    _header_scales(packed, b, d, minimum)
    lane = _SUB * (b % _BATCH)
    super_blocks.quantize(rows, _SUB * b, d, minimum, state, lane, top, level)
    _store_levels(packed, b, top > np.int32(15), level)


@kernel
def _encode_kernel(
    rows: Float32,
    packed: Bytes,
    grid: Float32,
    state: Float32,
    top: np.int32,
    first: np.float32,
    step: np.float32,
    steps: int,
) -> None:
    scale, low = np.empty(_SUB, np.uint8), np.empty(_SUB, np.uint8)
    size = rows.shape[1]  # not the constant: the compiler would write loops out
    for start in range(0, packed.shape[0], _BATCH):
        count = min(_BATCH, packed.shape[0] - start)
        search.load(rows, _SUB * start, _SUB * count, grid)
        affine_weights.by_spread(grid, state, size)
        search.search(grid, state, size, top, first, step, steps, False)
        for n in range(count):
            step_size = super_blocks.round_steps(
                state, search.SCALE, np.float32(1), _SUB * n, np.float32(63), _SIX_BITS, scale
            )
            blocks.store_half(packed, start + n, 0, step_size)
            step_size = super_blocks.round_steps(
                state, search.LOW, np.float32(-1), _SUB * n, np.float32(63), _SIX_BITS, low
            )
            blocks.store_half(packed, start + n, 2, step_size)
            _store(rows, packed, start + n, scale, low, state, top)


@kernel
def _weighted_kernel(
    rows: Float32,
    importance: Float32,
    sigma2: Float32,
    packed: Bytes,
    grid: Float32,
    state: Float32,
    positive: Float32,
    top: np.int32,
    clamp: np.uint8,
) -> None:
    scale, low = np.empty(_SUB, np.uint8), np.empty(_SUB, np.uint8)
    size = rows.shape[1]  # not the constant: the compiler would write loops out
    for start in range(0, packed.shape[0], _BATCH):
        count = min(_BATCH, packed.shape[0] - start)
        search.load(rows, _SUB * start, _SUB * count, grid)
        affine_weights.by_importance(grid, state, _SUB * start, importance, sigma2, _SUB)
        search.search(grid, state, size, top, _FIRST, _STEP, _STEPS, False)
        super_blocks.fit_steps(state, positive, 256 // size, np.int32(63))
        for n in range(count):
            step_size = super_blocks.take_steps(positive, n, clamp, scale)
            blocks.store_half(packed, start + n, 0, step_size)
            step_size = super_blocks.take_steps(positive, super_blocks.LOWS_AT + n, clamp, low)
            blocks.store_half(packed, start + n, 2, step_size)
            _store(rows, packed, start + n, scale, low, state, top)


def encoder(nbytes: int, top: int, candidates: Candidates) -> Callable[[Float32], Bytes]:
    """Make a function from (B, 256) weights to (B, nbytes) bytes."""

    def encode(weight: Float32) -> Bytes:
        packed = np.empty((len(weight), nbytes), np.uint8)
        grid, state = scratch(search.GRID_ROWS), scratch(search.STATE_ROWS)
        _encode_kernel(
            frozen(weight, (-1, _SIZE)),
            packed,
            grid,
            state,
            np.int32(top),
            np.float32(candidates.first),
            np.float32(candidates.step),
            candidates.steps,
        )
        return packed

    return encode


def weighted_encoder(nbytes: int, top: int, clamp: int) -> Callable[[Float32, Float32], Bytes]:
    """Make a function from (R, K) weights and (K,) importance to (R * K / 256, nbytes) bytes."""

    def encode(weight: Float32, importance: Float32) -> Bytes:
        packed = np.empty((weight.size // 256, nbytes), np.uint8)
        _weighted_kernel(
            frozen(weight, (-1, _SIZE)),
            frozen(importance, (-1, _SIZE)),
            affine_weights.mean_squares(weight, 256, 2.0),
            packed,
            scratch(search.GRID_ROWS),
            scratch(search.STATE_ROWS),
            positive_lanes.scratch(),
            np.int32(top),
            np.uint8(clamp),
        )
        return packed

    return encode


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
