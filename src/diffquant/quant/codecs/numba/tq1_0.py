"""Fast twin of codecs/tq1_0.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba.compile import kernel
from diffquant.quant.codecs.tq1_0 import RUNS

__all__ = ["decode"]

_RUNS = RUNS
_ONE = np.int32(1)


@kernel
def _decode_kernel(packed: Bytes, weight: Float32) -> None:
    for b in range(packed.shape[0]):
        d = blocks.load_half(packed, b, 52)
        at = 0
        for start, width, digits in _RUNS:
            power = np.int32(1)
            for _ in range(digits):
                for i in range(width):
                    fraction = np.int32(np.int32(packed[b, start + i]) * power) & np.int32(255)
                    digit = np.int32(np.int32(fraction * np.int32(3)) >> np.int32(8))
                    weight[b, at + i] = d * np.float32(np.int32(digit - _ONE))
                at += width
                power = np.int32(power * np.int32(3))


_, decode = row_codec(None, blocks.decoder(_decode_kernel, 256))
