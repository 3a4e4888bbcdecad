"""FP8 E5M2 with one float32 scale per tensor, amax / 57344; see fp8_scaled.py.

    weight: (R, K) uint8, the bit patterns; scale: () float32

ComfyUI loads it as `float8_e5m2`. Error: relative 2**-3 in the normal range.
"""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.fp8_e5m2 import E5M2_MAX, e5m2_bits, e5m2_table
from diffquant.quant.codecs.fp8_scaled import reduce, scale_for, scaled_codec

__all__ = ["decode", "encode", "reduce", "scale_of"]

encode, decode = scaled_codec(E5M2_MAX, e5m2_bits, e5m2_table())


def scale_of(amax: float) -> np.float32:
    """The scale of a tensor whose largest magnitude is `amax`."""
    return scale_for(amax, E5M2_MAX)
