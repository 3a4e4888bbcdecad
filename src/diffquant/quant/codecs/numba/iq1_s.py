"""Fast twin of codecs/iq1_s.py."""

from __future__ import annotations

import numpy as np

from diffquant.quant.codecs.arrays import Bytes, Float32
from diffquant.quant.codecs.ggml_rows import row_codec
from diffquant.quant.codecs.grids import grid
from diffquant.quant.codecs.iq1_s import SHIFT
from diffquant.quant.codecs.numba import blocks
from diffquant.quant.codecs.numba.compile import kernel

__all__ = ["decode"]

_SHIFT = SHIFT
_ONE = np.float32(1)
_TWO = np.float32(2)


@kernel
def _decode_kernel(packed: Bytes, weight: Float32, table: Float32) -> None:
    for b in range(packed.shape[0]):
        d = blocks.load_half(packed, b, 0)
        for s in range(8):
            word = blocks.load_short(packed, b, 34 + 2 * s)
            step = np.float32(np.int32((word >> np.int32(12)) & np.int32(7)))
            scale = np.float32(d * np.float32(_TWO * step + _ONE))
            shift = -_SHIFT if word >> np.int32(15) else _SHIFT
            for v in range(4):
                upper = np.int32((word >> np.int32(3 * v)) & np.int32(7))
                index = np.int32(packed[b, 2 + 4 * s + v]) | np.int32(upper << np.int32(8))
                for i in range(8):
                    weight[b, 32 * s + 8 * v + i] = scale * np.float32(table[index, i] + shift)


def _decode(packed: Bytes, weight: Float32) -> None:
    _decode_kernel(packed, weight, grid("iq1_s"))


_, decode = row_codec(None, blocks.decoder(_decode, 256))
