"""Fast twin of codecs/asym_w4a8_int8.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts, frozen
from diffquant.quant.codecs.asym_w4a8_int8 import CODEBOOK, GROUP_SIZE, SMALLEST
from diffquant.quant.codecs.fp8_e4m3 import e4m3_table
from diffquant.quant.codecs.numba.compile import inlined, kernel
from diffquant.quant.codecs.numba.fp8_e4m3 import e4m3_from_float
from diffquant.quant.codecs.numba.rotation import rotate
from diffquant.quant.formats import format_named

__all__ = ["decode", "encode"]

_LEVELS = np.float32(127)
_CODEBOOK = CODEBOOK
_SCALES = e4m3_table()
_ZERO = np.float32(0)


@inlined
def _nearest(value: np.float32, levels: Float32) -> np.int32:
    # Among ascending levels; a tie takes the lower one, NaN the lowest.
    below = np.int32(0)
    for i in range(16):
        below = np.int32(below + np.int32(levels[i] < value))
    low = np.int32(below - 1 if below > 0 else 0)
    high = np.int32(below if below < 16 else 15)
    over = np.float32(abs(np.float32(value - levels[high])))
    under = np.float32(abs(np.float32(value - levels[low])))
    return high if over < under else low


@inlined
def _sum16(lanes: Float32) -> np.float32:
    total = np.float32(lanes[0] + lanes[8])
    for i in range(1, 8):
        total = np.float32(total + np.float32(lanes[i] + lanes[i + 8]))
    return total


@inlined
def _round(value: np.float32) -> np.float32:
    level = np.float32(np.rint(value))
    level = _LEVELS if level > _LEVELS else level
    return -_LEVELS if level < -_LEVELS else level


@kernel
def _encode_kernel(
    rotated: Float32, packed: Bytes, byte: Bytes, channel: Float32, scales: Float32
) -> None:
    chosen = np.empty(GROUP_SIZE, np.float32)
    lanes = np.empty(GROUP_SIZE, np.float32)
    grid = np.empty(16, np.float32)
    for r in range(rotated.shape[0]):
        largest = _ZERO
        for g in range(byte.shape[1]):
            block = rotated[r, g * GROUP_SIZE : (g + 1) * GROUP_SIZE]
            amax = _ZERO
            for i in range(GROUP_SIZE):
                size = np.float32(abs(block[i]))
                amax = size if size > amax or size != size else amax
            scale = SMALLEST if amax < SMALLEST else amax
            for i in range(GROUP_SIZE):
                chosen[i] = _CODEBOOK[_nearest(np.float32(block[i] / scale), _CODEBOOK)]
            for _ in range(2):
                for i in range(GROUP_SIZE):
                    lanes[i] = np.float32(chosen[i] * chosen[i])
                squares = _sum16(lanes)
                squares = SMALLEST if squares < SMALLEST else squares
                for i in range(GROUP_SIZE):
                    lanes[i] = np.float32(block[i] * chosen[i])
                scale = np.float32(_sum16(lanes) / squares)
                scale = SMALLEST if scale < SMALLEST else scale
                for i in range(GROUP_SIZE):
                    chosen[i] = _CODEBOOK[_nearest(np.float32(block[i] / scale), _CODEBOOK)]
            scales[g] = scale
            for i in range(GROUP_SIZE):
                size = np.float32(abs(np.float32(chosen[i] * scale)))
                largest = size if size > largest or size != size else largest
        row = np.float32(largest / _LEVELS)
        row = SMALLEST if row < SMALLEST else row
        channel[r] = row
        for g in range(byte.shape[1]):
            byte[r, g] = e4m3_from_float(np.float32(scales[g] / row))
            step = _SCALES[byte[r, g]]
            for i in range(16):
                grid[i] = _round(np.float32(_CODEBOOK[i] * step))
            at = g * GROUP_SIZE
            for i in range(GROUP_SIZE // 2):
                low = _nearest(np.float32(rotated[r, at + 2 * i] / row), grid)
                high = _nearest(np.float32(rotated[r, at + 2 * i + 1] / row), grid)
                packed[r, at // 2 + i] = np.uint8(low | np.int32(high << np.int32(4)))


@kernel
def _decode_kernel(
    packed: Bytes, byte: Bytes, channel: Float32, codebook: Float32, rotated: Float32
) -> None:
    for r in range(rotated.shape[0]):
        for g in range(byte.shape[1]):
            step = _SCALES[byte[r, g]]
            at = g * GROUP_SIZE
            for i in range(GROUP_SIZE // 2):
                pair = packed[r, at // 2 + i]
                low = _round(np.float32(codebook[pair & np.uint8(15)] * step))
                high = _round(np.float32(codebook[pair >> np.uint8(4)] * step))
                rotated[r, at + 2 * i] = low * channel[r]
                rotated[r, at + 2 * i + 1] = high * channel[r]


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Rotate, fit block scales, choose codes; see codecs/asym_w4a8_int8.py."""
    del stats
    rotated = rotate(weight, format_named(fmt).rotation)
    rows, columns = weight.shape
    packed = np.empty((rows, columns // 2), np.uint8)
    byte = np.empty((rows, columns // GROUP_SIZE), np.uint8)
    channel = np.empty(rows, np.float32)
    _encode_kernel(rotated, packed, byte, channel, np.empty(byte.shape[1], np.float32))
    return {
        "weight": packed.view(np.int8),
        "s_rel": byte,
        "s_channel": channel,
        "codebook": CODEBOOK.copy(),
    }


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look codes up, put them on the int8 grid, scale and rotate back."""
    rows, columns = shape
    rotated = np.empty(shape, np.float32)
    _decode_kernel(
        frozen(parts["weight"], (rows, columns // 2)).view(np.uint8),
        frozen(parts["s_rel"], (rows, columns // GROUP_SIZE)).view(np.uint8),
        frozen(parts["s_channel"], rows),
        frozen(parts["codebook"], 16),
        rotated,
    )
    return rotate(rotated, format_named(fmt).rotation)
