"""Fast twin of codecs/q2_k.py: four super-blocks at a time, their 64 sub-blocks in search."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.affine_search import WEIGHTED
from diffquant.quant.codecs.arrays import Bytes, Float32, frozen
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import affine_lanes as search
from diffquant.quant.codecs.numba import affine_weights, blocks, positive_lanes, super_blocks
from diffquant.quant.codecs.numba.compile import inlined, kernel, merged
from diffquant.quant.codecs.numba.lanes import LANES, scratch
from diffquant.quant.codecs.q2_k import CANDIDATES

__all__ = ["decode", "encode"]

_SUB = 16  # sub-blocks of a super-block, and weights of a sub-block
_BATCH = LANES // _SUB
_LEVELS_AT = 16
_D_AT = 80
_DMIN_AT = 82
_NBYTES = 84
_TOP = np.int32(3)
_STEPS = np.int32(15)  # the largest scale, in steps
_BYTE = np.uint8(255)


@inlined
def _scales(packed: Bytes, b: int, d: Float32, minimum: Float32) -> None:
    scale_step, low_step = blocks.load_half(packed, b, _D_AT), blocks.load_half(packed, b, _DMIN_AT)
    for j in range(_SUB):
        d[j] = scale_step * np.float32(packed[b, j] & np.uint8(15))
        minimum[j] = low_step * np.float32(packed[b, j] >> np.uint8(4))


@merged
def _store(rows: Float32, packed: Bytes, b: int, scale: Bytes, low: Bytes, state: Float32) -> None:
    # The halves stand in `packed` already.
    d, minimum = np.empty(_SUB, np.float32), np.empty(_SUB, np.float32)
    level = np.empty((_SUB, _SUB), np.uint8)
    for j in range(_SUB):
        packed[b, j] = np.uint8(scale[j] | (low[j] << np.uint8(4)))
    _scales(packed, b, d, minimum)
    lane = _SUB * (b % _BATCH)
    super_blocks.quantize(rows, _SUB * b, d, minimum, state, lane, _TOP, level)
    for n in range(2):
        for part in range(2):
            for i in range(_SUB):
                quarters = np.uint8(0)
                for q in range(4):
                    quarters |= np.uint8(level[8 * n + 2 * q + part, i] << np.uint8(2 * q))
                packed[b, _LEVELS_AT + 32 * n + _SUB * part + i] = quarters


@kernel
def _encode_kernel(rows: Float32, packed: Bytes, grid: Float32, state: Float32) -> None:
    scale, low = np.empty(_SUB, np.uint8), np.empty(_SUB, np.uint8)
    first, step = np.float32(CANDIDATES.first), np.float32(CANDIDATES.step)
    size = rows.shape[1]  # not the constant: the compiler would write loops out
    for start in range(0, packed.shape[0], _BATCH):
        count = min(_BATCH, packed.shape[0] - start)
        search.load(rows, _SUB * start, _SUB * count, grid)
        affine_weights.by_magnitude(grid, size)
        search.search(grid, state, size, _TOP, first, step, CANDIDATES.steps, True)
        for n in range(count):
            top = np.float32(_STEPS)
            step_size = super_blocks.round_steps(
                state, search.SCALE, np.float32(1), _SUB * n, top, _BYTE, scale
            )
            blocks.store_half(packed, start + n, _D_AT, step_size)
            step_size = super_blocks.round_steps(
                state, search.LOW, np.float32(-1), _SUB * n, top, _BYTE, low
            )
            blocks.store_half(packed, start + n, _DMIN_AT, step_size)
            _store(rows, packed, start + n, scale, low, state)


@kernel
def _weighted_kernel(
    rows: Float32,
    importance: Float32,
    sigma2: Float32,
    packed: Bytes,
    grid: Float32,
    state: Float32,
    positive: Float32,
) -> None:
    scale, low = np.empty(_SUB, np.uint8), np.empty(_SUB, np.uint8)
    first, step = np.float32(WEIGHTED.first), np.float32(WEIGHTED.step)
    size = rows.shape[1]  # not the constant: the compiler would write loops out
    for start in range(0, packed.shape[0], _BATCH):
        count = min(_BATCH, packed.shape[0] - start)
        search.load(rows, _SUB * start, _SUB * count, grid)
        affine_weights.by_importance(grid, state, _SUB * start, importance, sigma2, _SUB)
        search.search(grid, state, size, _TOP, first, step, WEIGHTED.steps, False)
        super_blocks.fit_steps(state, positive, 256 // size, _STEPS)
        for n in range(count):
            step_size = super_blocks.take_steps(positive, n, _BYTE, scale)
            blocks.store_half(packed, start + n, _D_AT, step_size)
            step_size = super_blocks.take_steps(positive, super_blocks.LOWS_AT + n, _BYTE, low)
            blocks.store_half(packed, start + n, _DMIN_AT, step_size)
            _store(rows, packed, start + n, scale, low, state)


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    d, minimum = np.empty(_SUB, np.float32), np.empty(_SUB, np.float32)
    for b in range(packed.shape[0]):
        _scales(packed, b, d, minimum)
        for j in range(_SUB):
            half, quarter, part = j // 8, j // 2 % 4, j % 2
            at, down = _LEVELS_AT + 32 * half + _SUB * part, np.uint8(2 * quarter)
            scale, low = d[j], minimum[j]
            for i in range(_SUB):
                level = np.int32((packed[b, at + i] >> down) & np.uint8(3))
                weight[b, _SUB * j + i] = np.float32(np.float32(scale * np.float32(level)) - low)


def _encode(weight: Float32, packed: Bytes) -> None:
    grid, state = scratch(search.GRID_ROWS), scratch(search.STATE_ROWS)
    _encode_kernel(frozen(weight, (-1, _SUB)), packed, grid, state)


def _encode_weighted(weight: Float32, importance: Float32) -> Bytes:
    packed = np.empty((weight.size // 256, _NBYTES), np.uint8)
    _weighted_kernel(
        frozen(weight, (-1, _SUB)),
        frozen(importance, (-1, _SUB)),
        affine_weights.mean_squares(weight, 256),
        packed,
        scratch(search.GRID_ROWS),
        scratch(search.STATE_ROWS),
        positive_lanes.scratch(),
    )
    return packed


encode, decode = row_codec(
    blocks.encoder(_encode, _NBYTES), blocks.decoder(_decode_kernel, 256), _encode_weighted
)
