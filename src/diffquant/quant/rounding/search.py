"""Scale search: of the scales that a format can store, the one with the least squared error.

A plain encoder maps the largest magnitude of a run to the largest level, which is best for that
one element. The search tries smaller and larger scales, and where any float32 can be stored then
the least-squares scale of the levels found; errors are weighed per column where the layer's inputs
are known. The plain scale is among the candidates: no run gets worse.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32, Parts
from diffquant.quant.codecs.numba.rounding_lanes import pick_scales
from diffquant.quant.codecs.swizzle import rounded_up, unswizzle
from diffquant.quant.rounding.levels import LEVELS
from diffquant.quant.rounding.packing import blocks_of, columns_of, scales_of, stored_scales

__all__ = ["search_scales"]

_REFITS = 3
_FACTORS = {  # of amax / largest; eight bits lose more by clipping than four
    "four": np.linspace(0.60, 1.10, 26).astype(np.float32),
    "eight": np.linspace(0.80, 1.02, 12).astype(np.float32),
}
_E4M3_STEPS = np.arange(-9, 4)  # bytes around the plain one: 0.45 to 1.3 times its scale
_POWER_STEPS = np.array([0, -1, 1])


def search_scales(
    weight: Float32, parts: Parts, fmt: str, importance: Float32 | None = None
) -> tuple[Float32, Bytes | None]:
    """Choose the scales of all runs.

    Args:
        weight: (R, K) float32.
        parts: the plain encoder's.
        fmt: a format whose scales can be chosen.
        importance: (K,) what an error weighs per column, None for alike.

    Returns:
        (B,) scales, and the bytes they are stored as where the format keeps bytes.
    """
    row = LEVELS[fmt]
    runs = np.ascontiguousarray(blocks_of(weight, fmt))
    weigh = columns_of(importance, weight.shape[1], fmt)
    plain = scales_of(parts, (weight.shape[0], weight.shape[1]), fmt)
    stored = None
    if row.scales == "any":
        amax = np.abs(runs).max(axis=1, initial=0) / np.float32(row.largest)
        factors = _FACTORS["four" if row.values.size <= 16 else "eight"]
        candidates = np.concatenate([plain[:, None], amax[:, None] * factors], axis=1)
    else:
        stored = _neighbours(parts, weight.shape, fmt)
        candidates = stored_scales(stored.reshape(-1), parts, fmt).reshape(stored.shape)
    scales = np.empty(len(runs), np.float32)
    chosen = np.empty(len(runs), np.int64)
    pick_scales(
        runs,
        weigh,
        np.ascontiguousarray(candidates, np.float32),
        row.values,
        row.bounds,
        _REFITS if stored is None else 0,
        scales,
        chosen,
    )
    if stored is None:
        return scales, None
    return scales, np.take_along_axis(stored, chosen[:, None], axis=1)[:, 0]


def _neighbours(parts: Parts, shape: tuple[int, ...], fmt: str) -> Bytes:
    """Bytes of scales to try, the plain encoder's first: (B, C)."""
    block = LEVELS[fmt].block
    plain = unswizzle(parts["block_scale"], shape[0], rounded_up(shape[1], block) // block)
    byte = plain.reshape(-1, 1).astype(np.int16)
    steps, last = (_POWER_STEPS, 254) if fmt == "mxfp8" else (_E4M3_STEPS, 126)
    steps = np.concatenate([[0], steps[steps != 0]]).astype(np.int16)
    around = np.clip(byte + steps, 1, last)  # 0 is no scale at all
    return np.where(byte == 0, 0, around).astype(np.uint8)
