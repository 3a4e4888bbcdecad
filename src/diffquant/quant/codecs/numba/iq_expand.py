"""Fast twin of iq_blocks' lookup of grid points."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32, Int32, frozen
from diffquant.quant.codecs.grids import grid
from diffquant.quant.codecs.iq_blocks import Stored
from diffquant.quant.codecs.iq_search import SUPER_BLOCK
from diffquant.quant.codecs.numba.compile import kernel

__all__ = ["expand"]


@kernel
def _expand_kernel(
    d: Float32, point: Int32, signs: Bytes, magnitude: Float32, weight: Float32
) -> None:
    subs, groups, group = d.shape[1], point.shape[1], magnitude.shape[1]
    each = groups // subs
    for b in range(point.shape[0]):
        for g in range(groups):
            scale, at, first = d[b, g // each], point[b, g], group * g
            byte = np.int32(np.int32(signs[b, first // 8]) >> np.int32(first % 8))
            for i in range(group):
                scaled = np.float32(scale * magnitude[at, i])
                minus = np.int32(np.int32(byte >> np.int32(i)) & np.int32(1))
                flipped = np.int32(scaled.view(np.int32) ^ np.int32(minus << np.int32(31)))
                weight[b, first + i] = flipped.view(np.float32)


def expand(name: str, stored: Stored) -> Float32:
    """Make weights (B, 256) of unpacked super-blocks; every point is within the format's grid."""
    count = len(stored.d)
    weight = np.empty((count, SUPER_BLOCK), np.float32)
    _expand_kernel(
        frozen(stored.d, stored.d.shape),
        frozen(stored.point, stored.point.shape),
        frozen(stored.signs, (count, SUPER_BLOCK // 8)),
        grid(name),
        weight,
    )
    return weight
