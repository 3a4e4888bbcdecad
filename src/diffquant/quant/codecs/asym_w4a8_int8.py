"""4-bit codes of a rotated weight that decode onto an int8 grid: ComfyUI's W4A8.

    weight     (R, K / 2) int8: codes 0-15, even columns in the low nibble
    s_rel      (R, K / 16) e4m3 bits, a scale per 16 columns relative to the row's
    s_channel  (R,) float32
    codebook   (16,) float32, ascending: the best levels of a Gaussian block, always the same here

    level = round(codebook[code] * s_rel) clamped to +-127;  decoded = level * s_channel, rotated
    back (codecs/rotation.py)

A block's scale starts at its largest magnitude and is refined twice by least squares over the
nearest levels; s_channel puts the row's largest value at 127; at last codes are chosen anew among
the int8 levels that blocks really decode to. comfy_kitchen fits a codebook of its own where a
layer's rotated blocks are heavy-tailed (its comment: real models never are), on a random sample:
that is not done here. Sums of 16 are taken as torch takes them, eight lanes first, so that bytes
agree. Source: comfy_kitchen 0.2.40 backends/eager/w4a8_int8.py, tensor/w4a8_packed.py:11.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts
from diffquant.quant.codecs.fp8_e4m3 import e4m3_bits, e4m3_table
from diffquant.quant.codecs.rotation import rotate
from diffquant.quant.formats import format_named

__all__ = ["CODEBOOK", "GROUP_SIZE", "SMALLEST", "decode", "encode"]

GROUP_SIZE = 16
SMALLEST = np.float32(1e-8)
_REFINEMENTS = 2
_LEVELS = np.float32(127)
CODEBOOK: Float32 = np.array(
    (
        -0.980602,
        -0.794529,
        -0.638165,
        -0.500986,
        -0.377321,
        -0.263187,
        -0.155210,
        -0.050720,
        0.052541,
        0.156985,
        0.265284,
        0.379533,
        0.502636,
        0.638953,
        0.794876,
        0.980671,
    ),
    np.float32,
)


def _sum16(values: Float32) -> Float32:
    """Sums over the last 16, in torch's order: two halves, then lane by lane."""
    lanes = values[..., :8] + values[..., 8:]
    total: Float32 = lanes[..., 0]
    for lane in range(1, 8):
        total = total + lanes[..., lane]
    return total


def _over(blocks: Float32, scale: Float32) -> Float32:
    quotient: Float32 = blocks / scale[..., None]
    return quotient


def _nearest(values: Float32, levels: Float32) -> NDArray[np.intp]:
    """Index of the nearest of 16 ascending levels; a tie takes the lower one.

    Args:
        values: (R, G, 16).
        levels: (16,), or (R, G, 16).
    """
    below = (levels[..., None, :] < values[..., None]).sum(axis=-1)
    low, high = np.clip(below - 1, 0, 15), np.clip(below, 0, 15)
    table = np.broadcast_to(levels, (*values.shape[:2], 16))
    under = np.abs(values - np.take_along_axis(table, low, axis=2))
    over = np.abs(values - np.take_along_axis(table, high, axis=2))
    chosen: NDArray[np.intp] = np.where(over < under, high, low)
    return chosen


def encode(weight: Float32, stats: float | None = None, *, fmt: str) -> Parts:
    """Rotate, fit block scales, choose codes.

    Args:
        weight: (R, K) float32, C-contiguous; K a multiple of the format's group.
        stats: not used.
        fmt: its row names the group of the rotation.

    Returns:
        The parts named above.

    Error: half the widest gap of the codebook (0.093) times the block's scale, and half a grid
    step; relative RMSE 0.073 on Gaussian weights.
    """
    del stats
    rotated = rotate(weight, format_named(fmt).rotation)
    blocks = rotated.reshape(len(weight), -1, GROUP_SIZE)
    with np.errstate(all="ignore"):
        scale: Float32 = np.maximum(np.abs(blocks).max(axis=2), SMALLEST)  # (R, G)
        chosen = CODEBOOK[_nearest(_over(blocks, scale), CODEBOOK)]
        for _ in range(_REFINEMENTS):
            squares = np.maximum(_sum16(chosen * chosen), SMALLEST)
            scale = np.maximum(_sum16(blocks * chosen) / squares, SMALLEST)
            chosen = CODEBOOK[
                _nearest(np.divide(blocks, scale[..., None], dtype=np.float32), CODEBOOK)
            ]
        largest = np.abs(chosen * scale[..., None]).max(axis=(1, 2), initial=0)
        channel = np.maximum(largest / _LEVELS, SMALLEST)  # (R,)
        byte = e4m3_bits(np.ascontiguousarray(scale / channel[:, None]))
        step = e4m3_table()[byte]
        grid: Float32 = np.clip(np.rint(CODEBOOK * step[..., None]), -_LEVELS, _LEVELS)
        chosen_codes = _nearest(blocks / channel[:, None, None], grid)
    code: Bytes = chosen_codes.astype(np.uint8).reshape(weight.shape)
    packed: Bytes = (code[:, ::2] | (code[:, 1::2] << 4)).astype(np.uint8)
    return {
        "weight": packed.view(np.int8),
        "s_rel": byte,
        "s_channel": channel,
        "codebook": CODEBOOK.copy(),
    }


def decode(parts: Mapping[str, NDArray[Any]], shape: tuple[int, int], *, fmt: str) -> Float32:
    """Look codes up, put them on the int8 grid, scale and rotate back.

    Args:
        parts: as `encode` returns them; any codebook is followed.
        shape: (R, K).
        fmt: its row names the group of the rotation.
    """
    packed = parts["weight"].reshape(shape[0], shape[1] // 2).view(np.uint8)
    code = np.stack([packed & 15, packed >> 4], axis=2).reshape(shape[0], -1, GROUP_SIZE)
    step = e4m3_table()[parts["s_rel"].reshape(shape[0], -1).view(np.uint8)]
    with np.errstate(all="ignore"):
        level = np.rint(parts["codebook"].reshape(-1)[code] * step[..., None])
        level = np.clip(level, -_LEVELS, _LEVELS).reshape(shape)
        rotated: Float32 = level * parts["s_channel"].reshape(-1, 1)
    return rotate(rotated, format_named(fmt).rotation)
