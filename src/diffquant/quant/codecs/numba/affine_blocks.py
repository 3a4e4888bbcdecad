"""Blocks of Q4_1 and Q5_1 with importance: 64 at a time in search; without, they need none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffquant.quant.codecs.affine_search import WEIGHTED
from diffquant.quant.codecs.arrays import Bytes, Float32, frozen
from diffquant.quant.codecs.numba import affine_lanes as search
from diffquant.quant.codecs.numba import affine_weights, blocks
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.lanes import LANES, scratch

__all__ = ["weighted_encoder"]

_SIZE = 32
_FIRST = np.float32(WEIGHTED.first)
_STEP = np.float32(WEIGHTED.step)
_STEPS = WEIGHTED.steps


@kernel
def _kernel(
    rows: Float32,
    importance: Float32,
    sigma2: Float32,
    packed: Bytes,
    grid: Float32,
    state: Float32,
    top: np.int32,
) -> None:
    level = np.empty((_SIZE, LANES), np.uint8)
    five = top > np.int32(15)
    nibbles_at = 8 if five else 4
    size = rows.shape[1]
    for start in range(0, packed.shape[0], LANES):
        count = min(LANES, packed.shape[0] - start)
        search.load(rows, start, count, grid)
        affine_weights.by_importance(grid, state, start, importance, sigma2, importance.shape[0])
        search.search(grid, state, size, top, _FIRST, _STEP, _STEPS, False)
        search.take_levels(grid, state, size, top, level)
        for n in range(count):
            b = start + n
            blocks.store_half(packed, b, 0, state[search.SCALE, n])
            blocks.store_half(packed, b, 2, state[search.LOW, n])
            if five:
                fifth = np.uint32(0)
                for i in range(_SIZE):
                    fifth |= blocks.fifth_bit(np.int32(level[i, n]), i)
                blocks.store_word(packed, b, 4, fifth)
            for i in range(16):
                low, high = level[i, n] & np.uint8(15), level[16 + i, n]
                packed[b, nibbles_at + i] = np.uint8(low | (high << np.uint8(4)))


def weighted_encoder(nbytes: int, top: int) -> Callable[[Float32, Float32], Bytes]:
    """Make a function from (R, K) weights and (K,) importance to (R * K / 32, nbytes) bytes."""

    def encode(weight: Float32, importance: Float32) -> Bytes:
        packed = np.empty((weight.size // _SIZE, nbytes), np.uint8)
        _kernel(
            frozen(weight, (-1, _SIZE)),
            frozen(importance, (-1, _SIZE)),
            affine_weights.mean_squares(weight, weight.shape[1]),
            packed,
            scratch(search.GRID_ROWS),
            scratch(search.STATE_ROWS),
            np.int32(top),
        )
        return packed

    return encode
