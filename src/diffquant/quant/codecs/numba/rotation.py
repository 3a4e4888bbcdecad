"""Fast twin of codecs/rotation.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.rotation import check_groups

__all__ = ["rotate"]

_HALF = np.float32(0.5)


@kernel
def _pass(flat: Float32, out: Float32, stride: int) -> None:
    # Four slices that lie `stride` apart: the inner loop runs along memory.
    for start in range(0, flat.size, 4 * stride):
        for i in range(start, start + stride):
            a, b = flat[i], flat[i + stride]
            c, d = flat[i + 2 * stride], flat[i + 3 * stride]
            out[i] = np.float32(np.float32(a + b) + np.float32(c - d)) * _HALF
            out[i + stride] = np.float32(np.float32(a + b) - np.float32(c - d)) * _HALF
            out[i + 2 * stride] = np.float32(np.float32(a - b) + np.float32(c + d)) * _HALF
            out[i + 3 * stride] = np.float32(np.float32(b - a) + np.float32(c + d)) * _HALF


def rotate(weight: Float32, group: int) -> Float32:
    """Rotate groups of every row; see codecs/rotation.py."""
    check_groups(weight, group)
    out = np.array(weight, np.float32, order="C").reshape(-1)
    stride = 1
    while stride < group:
        _pass(out, out, stride)
        stride *= 4
    return out.reshape(weight.shape)
