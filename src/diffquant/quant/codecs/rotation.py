"""ConvRot: groups of a row times a Hadamard matrix, which spreads outliers over their group.

H is the Kronecker power of the "regular" 4 x 4 Hadamard matrix divided by its length::

    1/2 *  1  1  1 -1        orthogonal and symmetric: H H = 1,
           1  1 -1  1        so that rotating twice gives the weight back
           1 -1  1  1
          -1  1  1  1

for groups of 4 ** n numbers. It is applied factor by factor: n passes of sums of four numbers,
each halved, in float32. comfy_kitchen multiplies by the whole matrix, whose sums round in another
order: the results agree to float32's rounding, and exactly where no sum rounds (tested).
Source: comfy_kitchen 0.2.40 tensor/int8_utils.py:12-60.
"""

from __future__ import annotations

import numpy as np

from diffquant.core.errors import UnsupportedShape
from diffquant.quant.codecs.arrays import Float32

__all__ = ["check_groups", "rotate"]

_HALF = np.float32(0.5)


def check_groups(weight: Float32, group: int) -> None:
    """Refuse rows that are no whole groups.

    Raises:
        UnsupportedShape: they are not.
    """
    if weight.shape[1] % group:
        raise UnsupportedShape(
            f"rotation needs row length divisible by {group}, got shape {weight.shape}"
        )


def rotate(weight: Float32, group: int) -> Float32:
    """Rotate groups of every row; its own inverse.

    Args:
        weight: (R, K) float32, not modified.
        group: a power of 4 that divides K.

    Returns:
        (R, K) float32.

    Raises:
        UnsupportedShape: K is not divisible by the group.
    """
    check_groups(weight, group)
    out = weight.copy()
    stride = 1
    with np.errstate(invalid="ignore", over="ignore"):
        while stride < group:
            view = out.reshape(len(weight), -1, 4, stride)
            a, b, c, d = (view[:, :, i].copy() for i in range(4))
            view[:, :, 0] = ((a + b) + (c - d)) * _HALF
            view[:, :, 1] = ((a + b) - (c - d)) * _HALF
            view[:, :, 2] = ((a - b) + (c + d)) * _HALF
            view[:, :, 3] = ((b - a) + (c + d)) * _HALF
            stride *= 4
    return out
