"""FP8 E4M3 with one float32 scale per tensor, amax / 448; see fp8_scaled.py.

    weight: (R, K) uint8, the bit patterns; scale: () float32

ComfyUI loads it as `float8_e4m3fn`. Error: relative 2**-4 for magnitudes above amax / 28672, else
absolute scale * 2**-10.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.fp8_e4m3 import E4M3_MAX, e4m3_bits, e4m3_table
from diffquant.quant.codecs.fp8_scaled import reduce, scale_for, scaled_codec

__all__ = ["decode", "encode", "reduce", "scale_of"]

encode, decode = scaled_codec(E4M3_MAX, e4m3_bits, e4m3_table())


def scale_of(amax: float) -> np.float32:
    """The scale of a tensor whose largest magnitude is `amax`."""
    return scale_for(amax, E4M3_MAX)
