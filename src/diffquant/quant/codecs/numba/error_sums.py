"""Sums of squares for quant/metrics.py in one pass over float32 arrays, added in float64.

Sixty-four running sums side by side let the compiler use vectors without reordering any of them, so
the result does not depend on the machine.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Float32
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.numba.lanes import LANES

__all__ = ["error_sums"]


@kernel
def error_sums(reference: Float32, decoded: Float32) -> tuple[float, float, float]:
    """Sum x squared, y squared and (x - y) squared over two flat arrays of one size."""
    sums = np.zeros((3, LANES), np.float64)
    whole = reference.size - reference.size % LANES
    for start in range(0, whole, LANES):
        for k in range(LANES):
            x, y = np.float64(reference[start + k]), np.float64(decoded[start + k])
            noise = x - y
            sums[0, k] += x * x
            sums[1, k] += y * y
            sums[2, k] += noise * noise
    for i in range(whole, reference.size):
        x, y = np.float64(reference[i]), np.float64(decoded[i])
        noise = x - y
        sums[0, 0] += x * x
        sums[1, 0] += y * y
        sums[2, 0] += noise * noise
    return sums[0].sum(), sums[1].sum(), sums[2].sum()
