"""What Q2_K, Q4_K and Q5_K share: steps of scales, and levels against what is stored.

A super-block's sub-blocks stand in neighbouring lanes of affine_lanes' state; `first` is the lane
of its first one. Weights come as sub-blocks, (B, size).
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.numba import affine_lanes, positive_lanes
from diffquant.quant.codecs.numba.compile import inlined, merged
from diffquant.quant.codecs.numba.floats import nearest_int
from diffquant.quant.codecs.numba.lanes import LANES
from diffquant.quant.codecs.numba.positive_lanes import LEVEL, POSITIVE_LANES, WEIGHT

__all__ = ["LOWS_AT", "fit_steps", "quantize", "round_steps", "take_steps"]

LOWS_AT = POSITIVE_LANES // 2  # lane of the first super-block's minima
_ZERO = np.float32(0)


@inlined
def round_steps(
    state: Float32,
    row: int,
    sign: np.float32,
    first: int,
    top: np.float32,
    clamp: np.uint8,
    steps: Bytes,
) -> np.float32:
    """Round a super-block's scales or minima against the largest; returns the size of a step."""
    most = _ZERO
    for j in range(steps.size):
        value = np.float32(sign * state[row, first + j])
        most = value if value > most else most
    inverse = np.float32(top / most) if most > _ZERO else _ZERO
    for j in range(steps.size):
        value = np.float32(sign * state[row, first + j])
        step = np.uint8(nearest_int(np.float32(inverse * value)))
        steps[j] = step if step < clamp else clamp
    return np.float32(most / top)


@merged
def fit_steps(state: Float32, positive: Float32, count: int, top: np.int32) -> None:
    """Search steps for all super-blocks at once: scales in lanes 0 and on, minima in LOWS_AT on.

    Args:
        state: after affine_lanes.search.
        positive: from positive_lanes.scratch.
        count: sub-blocks of a super-block.
        top: largest step.
    """
    for b in range(LANES // count):
        for j in range(count):
            lane = count * b + j
            positive[j, b] = state[affine_lanes.SCALE, lane]
            positive[j, LOWS_AT + b] = -state[affine_lanes.LOW, lane]
            positive[WEIGHT + j, b] = state[affine_lanes.SUM_W, lane]
            positive[WEIGHT + j, LOWS_AT + b] = state[affine_lanes.SUM_W, lane]
    positive_lanes.search(positive, count, top)


@inlined
def take_steps(positive: Float32, lane: int, clamp: np.uint8, steps: Bytes) -> np.float32:
    """Copy the steps of one lane, none above `clamp`; returns the size of a step."""
    for j in range(steps.size):
        step = np.uint8(np.int32(positive[LEVEL + j, lane]))
        steps[j] = step if step < clamp else clamp
    return np.float32(positive[positive_lanes.SCALE, lane])


@inlined
def _clamp(level: np.int32, top: np.int32) -> np.uint8:
    level = level if level > np.int32(0) else np.int32(0)
    return np.uint8(level if level < top else top)


@merged
def quantize(
    rows: Float32,
    first: int,
    d: Float32,
    minimum: Float32,
    state: Float32,
    lane: int,
    top: np.int32,
    level: Bytes,
) -> None:
    """Take levels against the stored scale; where that is 0, those that the search found.

    Args:
        rows: (B, size) sub-blocks.
        first: the super-block's first row.
        d: (count,) stored scales.
        minimum: (count,) stored minima.
        state: after affine_lanes.search.
        lane: the super-block's first lane.
        top: largest level.
        level: (count, size), filled.
    """
    count, size = level.shape
    for j in range(count):
        if d[j] != _ZERO:
            scale, low = d[j], minimum[j]
            for i in range(size):
                shifted = np.float32(rows[first + j, i] + low)
                level[j, i] = _clamp(nearest_int(np.float32(shifted / scale)), top)
        else:
            iscale = state[affine_lanes.FIT_ISCALE, lane + j]
            low = state[affine_lanes.FIT_LOW, lane + j]
            for i in range(size):
                shifted = np.float32(rows[first + j, i] - low)
                level[j, i] = _clamp(nearest_int(np.float32(iscale * shifted)), top)
